"""What the quantized input y does not predict linearly of the streams of an input, and what a weight makes of that: the problem
of Init-LRC (see `lrc`).

With t' = t - E[t y^T] E[y y^T]^-1 y, x' likewise and y damped by d, moments of two streams a' and b' are Schur complements.
With a = y + e, b = y + f they are

    E[a' b'^T] = E[e f^T] + d - (E[e y^T] - d) (E[y y^T] + d)^-1 (E[f y^T] - d)^T,

whose second term is of the size of the result, not of the Gram matrices: float32 is enough for it. Semidefinite when a is b;
of a recipe that is weight-only nothing but the damping is left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.moments import difference, lost
from counterweight.workers.compensation.symmetric import symmetric_product
from counterweight.workers.quantization.target import damped, divider, solving_dtype


class Unseen:
    """Of one input. What its linears share is made when the first of them asks, and kept. Sums over tokens, not means; of an
    input that saw none the identity."""

    def __init__(self, statistics: InputStatistics, damping: float) -> None:
        self._statistics, self._damping = statistics, damping

    def problem(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """M [out, in] and G [in, in] float64 for `weight` [out, in] float64: the leading left singular vectors of M G^(1/2) are
        those of Init-LRC's branch."""
        metric, project = self._dense
        return project(weight), metric

    def square(self, weight: Tensor) -> Tensor | None:
        """M G M^T [out, out] float32 by what `weight` [out, in] makes of both terms, where t is x: for one of few rows less
        work than G. None where the damped E[y y^T] has no Cholesky factor."""
        if self._thin is None:
            return None
        noise, beside, root = self._thin
        narrow = weight.float()
        lost = symmetric_product(narrow @ noise, narrow.T)
        predicted = torch.linalg.solve_triangular(root.T, narrow @ beside, upper=True, left=False)
        return lost.sub_(symmetric_product(predicted, predicted.T))

    @cached_property
    def _dense(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """G, and what makes M of a weight."""
        statistics, damping = self._statistics, self._damping
        if not statistics.tokens:
            return torch.eye(statistics.width, dtype=torch.float64, device=statistics.product("xx").device), _unchanged
        if "t" not in statistics.streams:
            return remainder(statistics, "xx", damping), _unchanged
        metric, crossed = remainder(statistics, "xx", damping), remainder(statistics, "tx", damping)
        divide = divider(metric, damping)
        return metric, lambda weight: divide(weight @ crossed)

    @cached_property
    def _thin(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """E[e e^T] + d, E[e y^T] - d and Cholesky's factor of E[y y^T] + d, with e = x - y; float32."""
        statistics, damping = self._statistics, self._damping
        root, failed = torch.linalg.cholesky_ex(damped(statistics.product("yy"), damping))
        if int(failed):
            return None
        root = root.float()
        noise = lost(statistics, torch.float32)
        noise.diagonal().add_(_added(statistics, damping))
        return noise, _beside(statistics, "x", damping, torch.float32), root


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def remainder(statistics: InputStatistics, streams: str, damping: float) -> Tensor:
    """Sum over tokens of a' b'^T for two streams a and b, [in, in] float64."""
    first, second = streams[0], streams[1]
    yy = statistics.product("yy")
    single = solving_dtype(len(yy), damping)
    left = _beside(statistics, first, damping, single)
    right = left if first == second else _beside(statistics, second, damping, single)
    predicted = _through_inverse(left, right, damped(yy, damping))
    del left, right
    noise = lost(statistics, torch.float64, streams)
    noise.diagonal().add_(_added(statistics, damping))
    return noise.sub_(predicted)


def _added(statistics: InputStatistics, damping: float) -> Tensor:
    """d."""
    return damping * statistics.product("yy").diagonal().mean()


def _beside(statistics: InputStatistics, stream: str, damping: float, dtype: torch.dtype) -> Tensor:
    """E[(a - y) y^T] - d of a stream a."""
    found = difference(statistics, f"{stream}y", "yy", dtype)
    found.diagonal().sub_(_added(statistics, damping))
    return found


def _through_inverse(left: Tensor, right: Tensor, regular: Tensor) -> Tensor:
    """left regular^-1 right^T, factorized in float64 and solved in the dtype of `left`; symmetric where left is right."""
    root, failed = torch.linalg.cholesky_ex(regular)
    if int(failed):
        inverse: Tensor = torch.linalg.pinv(regular, hermitian=True).to(left.dtype)
        return left @ (inverse @ right.T)
    # From the right: LAPACK takes rows as they lie, and half of the time.
    upper = root.to(left.dtype).T
    del root
    solved = torch.linalg.solve_triangular(upper, left, upper=True, left=False)
    if left is right:
        return symmetric_product(solved, solved.T)
    other = torch.linalg.solve_triangular(upper, right, upper=True, left=False)
    found: Tensor = solved @ other.T
    return found
