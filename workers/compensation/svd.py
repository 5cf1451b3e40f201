"""The best low-rank approximation of what quantization left, for the inputs that the layer sees.

For the residual E = W - Q [out, in] and a metric G [in, in], the branch minimizes ||(E - up down) G^(1/2)||_F. By
Eckart-Young in the whitened space, with the left singular vectors U of E G^(1/2), a minimizer is

    up down = U_r U_r^T E,    error^2 = sum_{i>r} s_i^2.

G is I (LoRC, Yao et al. 2023; LQER), diag(E|x|)^2 (L2QER, Zhang et al. 2024), diag(E[x^2]) (QERA-approx, Zhang et al. 2024) or
E[x x^T], for which the error is that of the layer's output (QERA-exact, and the same solution under other names in ASER, Zhao
et al. 2024, and EoRA, Liu et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.regression import directions, factors, stored
from counterweight.workers.compensation.result import CompensationResult
from counterweight.workers.methods.compensations import SVD
from counterweight.workers.quantization.inputs import checked_matrix, checked_statistics
from counterweight.workers.quantization.result import Fallback
from counterweight.workers.quantization.target import damped


def deflated(options: SVD, statistics: InputStatistics, rows: int) -> InputStatistics:
    """The statistics with which to quantize a layer of `rows` outputs that this branch will follow.

    A branch that reads the r leading eigenvectors of G removes any error along them, so only the rest of G is left to
    the quantizer: G - anticipation * V_r diag(l_r) V_r^T. The leading ones, because no other r directions hold more of
    tr G = E||x||^2. (H-SVDQuant, 2026, deflates by the branch's own directions instead.) Layers may share a solve only if
    they have the same rank. Raises ValueError for statistics that are not finite and for a rank that the layer is too small
    for.
    """
    if not options.anticipates:
        return statistics
    gram = checked_statistics(statistics, statistics.width).product("xx")
    values, vectors = torch.linalg.eigh(gram)
    rank = options.rank.resolve(rows, statistics.width, values)
    leading = vectors[:, -rank:]
    taken = (leading * (options.anticipation * values[-rank:].clamp_min(0))) @ leading.T
    return InputStatistics(gram=gram - taken, tokens=statistics.tokens)


def svd(
    options: SVD, residual_target: Tensor, statistics: InputStatistics | None, dtype: torch.dtype
) -> CompensationResult:
    """The branch for `residual_target` [out, in] = W - Q, with factors stored in `dtype`; computed in float64.

    statistics: of the layer's input; None only when whitening is `none`. Recorded fallbacks: no token (plain SVD), a
    residual of zero (no branch). Raises ValueError for a residual that is not a finite matrix, for statistics that are
    absent, not finite or of another width, and for a rank that the layer is too small for.
    """
    residual = checked_matrix("residual", residual_target).double()
    scales, gram, fallbacks = _metric(options, residual.shape[1], statistics)
    values, vectors = directions(residual if scales is None else residual * scales, gram, options.rank)
    if not bool(values[0] > 0):
        cause = "the residual is zero on every input that was seen: no branch"
        return CompensationResult(
            low_rank=None,
            fallbacks=(*fallbacks, Fallback(step="svd.residual", cause=cause)),
        )
    low_rank = stored(factors(vectors, residual, dtype), options.factor_bits)
    return CompensationResult(low_rank=low_rank, fallbacks=fallbacks)


def _metric(
    options: SVD, columns: int, statistics: InputStatistics | None
) -> tuple[Tensor | None, Tensor | None, tuple[Fallback, ...]]:
    """The metric: where it is diagonal, the root of its diagonal [in]; otherwise G [in, in]; neither for the identity."""
    if options.whitening == "none":
        return None, None, ()
    nothing = (Fallback(step="svd.tokens", cause="no calibration token arrived: plain residual"),)
    if options.whitening == "magnitude":
        magnitude = _magnitude(statistics, columns)
        return magnitude, None, () if magnitude is not None else nothing
    gram = checked_statistics(statistics, columns).mean_gram()
    power = gram.diagonal()
    if not bool((power > 0).any()):
        return None, None, nothing
    if options.whitening == "diagonal":
        return (power + options.damping * power.mean()).sqrt(), None, ()
    return None, damped(gram, options.damping), ()


def _magnitude(statistics: InputStatistics | None, columns: int) -> Tensor | None:
    """E|x| [in], None where all of it was zero; a channel that was always zero counts as little as any that was not."""
    if statistics is None or not statistics.tokens:
        return None
    if statistics.absolute is None or len(statistics.absolute) != columns:
        raise ValueError(f"statistics: no sum of |x|: expected one of {columns} channels for a whitening by magnitude")
    mean = statistics.absolute / statistics.tokens
    return mean.clamp_min(mean[mean > 0].min()) if bool((mean > 0).any()) else None
