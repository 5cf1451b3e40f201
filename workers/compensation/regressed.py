"""A matrix with a regression in it, M = E + (sum_k A_k D_k) G^-1 [out, in], by what it makes of a few columns: it is never
multiplied out, and G is solved with for these columns alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.moments import difference
from counterweight.workers.quantization.target import damped, solving_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Regressor:
    """What is the same for all linears that read one input, [in, in] each and of one float dtype. metric: G, damped; root: its
    lower Cholesky factor; differences: each D_k."""

    metric: Tensor
    root: Tensor
    differences: Sequence[Tensor]

    @classmethod
    def of(cls, statistics: InputStatistics, damping: float, *, joint: bool) -> Regressor | None:
        """Of Update-LR: E[x x^T]; where it is joint, what the codes' input is not, E[(x - y) x^T], and the original's,
        E[(t - x) x^T], if that is another. None where the metric has no Cholesky factor."""
        gram = statistics.product("xx")
        metric = damped(gram, damping) if statistics.tokens else torch.eye(len(gram)).to(gram)
        root, failed = torch.linalg.cholesky_ex(metric)
        if int(failed):
            return None
        dtype = solving_dtype(len(gram), damping)
        metric, root = metric.to(dtype), root.to(dtype)
        moved = differences(statistics, dtype) if joint and statistics.tokens else []
        return cls(metric=metric, root=root, differences=moved)


def differences(statistics: InputStatistics, dtype: torch.dtype) -> list[Tensor]:
    """By what Update-LR's regression multiplies the codes, E[(x - y) x^T], and the weight where the original's input is
    another, E[(t - x) x^T]; [in, in], turned round from products as they lie."""
    found = [difference(statistics, "xx", "xy", dtype).T]
    if "t" in statistics.streams:
        found.append(difference(statistics, "xt", "xx", dtype).T)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Regressed:
    """rest: E [out, in]; moved: each A_k [out, in]; both in the dtype of `by`, as the columns are that it is multiplied by."""

    rest: Tensor
    moved: Sequence[Tensor]
    by: Regressor

    def squared(self, block: Tensor) -> Tensor:
        """M G M^T times [out, n]."""
        seen = self.by.metric @ (self.rest.T @ block) + self._regressed(block)
        found = self.rest @ seen
        if self.moved:
            solved = torch.cholesky_solve(seen, self.by.root)
            for matrix, product in zip(self.moved, self.by.differences, strict=True):
                found += matrix @ (product @ solved)
        return found

    def transposed(self, block: Tensor) -> Tensor:
        """M^T times [out, n]."""
        found = self.rest.T @ block
        return found + torch.cholesky_solve(self._regressed(block), self.by.root) if self.moved else found

    def _regressed(self, block: Tensor) -> Tensor:
        """The sum of D_k^T A_k^T times [out, n]."""
        found = block.new_zeros(self.rest.shape[1], block.shape[1])
        for matrix, product in zip(self.moved, self.by.differences, strict=True):
            found += product.T @ (matrix.T @ block)
        return found
