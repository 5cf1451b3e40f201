"""GPTQ: columns are rounded one after the other, and each passes its error on to those still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), in the form of
LDLQ (Chee et al., "QuIP", 2023), which gives the same codes. With the Hessian H = E[x x^T] = U U^T, U upper triangular, and
the total error e = w - q of a row, the output error is

    e H e^T = sum_j U_jj^2 (e_j + sum_{i<j} e_i U_ij / U_jj)^2.

So column j is rounded from the target w_j + sum_{i<j} e_i U_ij / U_jj, which makes the j-th term as small as the grid
allows. One Cholesky factorization is all it takes: no inverse. U_jj^2 is the part of E[x_j^2] that later columns cannot
make up for, hence the importance of column j in the search for scales.

`refinement` then descends cyclically: each code is set to its best value given all the others (Behdin et al., "QuantEase",
2023), which never increases the same objective and lets early columns see what became of late ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.quantization.columns import Columns, Metric
from counterweight.workers.quantization.inputs import checked_matrix, checked_statistics
from counterweight.workers.quantization.result import Fallback, QuantizationResult

_DAMPING_ATTEMPTS = 4  # the damping that was asked for, then three times ten times more
_DAMPING_STEP = 10.0


def gptq(
    options: GPTQ, weight: Tensor, statistics: InputStatistics | None, format: WeightFormat, scale_dtype: torch.dtype
) -> QuantizationResult:
    """Codes of `weight` [out, in] with the smallest ||(W - Q) X||^2 that this greedy order finds.

    Rows are independent, so layers that share an input may be stacked along `out`. Factorization in float64, the
    loop over columns in float32. Recorded fallbacks: no token (round to nearest), columns whose input was always
    zero (rounded to nearest), damping raised, no Cholesky factor at any damping (round to nearest). Raises ValueError
    for a weight that is not a finite matrix, that groups do not tile, or whose scales do not fit `scale_dtype`, and for
    statistics that are absent, not finite or of another width.
    """
    matrix = checked_matrix("weight", weight)
    hessian = checked_statistics(statistics, matrix.shape[1]).mean_gram()
    power = hessian.diagonal().clone()
    order = power.argsort(descending=True, stable=True)
    if not options.act_order:
        order = order.sort().values
    dead = int((power <= 0).sum())
    if dead == len(power):
        no_token = Fallback(step="gptq.tokens", cause="no calibration token arrived: rounded to nearest")
        return _round(options, matrix, format, scale_dtype, no_token)
    fallbacks: list[Fallback] = []
    if dead:
        cause = f"{dead} of {len(power)} columns: no input but zero was seen: rounded to nearest"
        fallbacks.append(Fallback(step="gptq.dead_columns", cause=cause))
    hessian = hessian[order]
    hessian = hessian[:, order]
    metric = _factorize(options.damping, hessian, fallbacks)
    if metric is None:
        return _round(options, matrix, format, scale_dtype, *fallbacks)
    importance = torch.empty_like(power).index_copy_(0, order, metric.root.diagonal().square()).float()
    grid = options.scale.fit(matrix, format, scale_dtype, importance)
    columns = Columns(matrix, grid, order)
    codes = columns.rounded(metric, options.refinement, options.block_size)
    return QuantizationResult(weight=grid.with_codes(columns.restore(codes)), fallbacks=tuple(fallbacks))


def _factorize(damping_asked: float, hessian: Tensor, fallbacks: list[Fallback]) -> Metric | None:
    """The metric of a `hessian` in rounding order, which is damped in place; None when no damping makes it positive definite in
    float64."""
    power = hessian.diagonal().clone()
    typical = power[power > 0].median()
    for attempt in range(_DAMPING_ATTEMPTS):
        damping = damping_asked * _DAMPING_STEP**attempt
        hessian.diagonal().copy_(power + typical * damping)
        # Reversed order turns the lower factor that LAPACK computes into the upper one.
        root, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not int(failed):
            if attempt:
                cause = f"no Cholesky factor at {damping_asked:g}: raised to {damping:g}"
                fallbacks.append(Fallback(step="gptq.damping", cause=cause))
            return Metric(hessian=hessian, root=root.flip(0, 1))
    cause = f"no Cholesky factor up to a damping of {damping:g}: rounded to nearest"
    fallbacks.append(Fallback(step="gptq.cholesky", cause=cause))
    return None


def _round(
    options: GPTQ, weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, *fallbacks: Fallback
) -> QuantizationResult:
    grid = options.scale.fit(weight, format, scale_dtype, None)
    return QuantizationResult(weight=grid.round(weight), fallbacks=fallbacks)
