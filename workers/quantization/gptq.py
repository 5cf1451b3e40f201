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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.quantization.columns import Columns, Metric
from counterweight.workers.quantization.grid import Grid
from counterweight.workers.quantization.inputs import checked_matrices, checked_statistics
from counterweight.workers.quantization.result import Fallback, QuantizationResult

_DAMPING_ATTEMPTS = 4  # the damping that was asked for, then three times ten times more
_DAMPING_STEP = 10.0
_STRIPS = {"cpu": 128, "cuda": 512}
"""Rows and columns of a matrix that are put in order at a time. On a CPU what is beside the matrix itself then stays in a
cache; on a GPU strips of 128 were half of some hundred thousand launches for a block of Qwen3-30B-A3B."""


def gptq(
    options: GPTQ,
    weights: Tensor,
    statistics: Sequence[InputStatistics | None],
    format: WeightFormat,
    scale_dtype: torch.dtype,
) -> list[QuantizationResult]:
    """Codes of each of `weights` [batch, out, in] with the smallest ||(W - Q) X||^2 that this greedy order finds.

    statistics: of each one's own input. Each weight gets the codes that it gets alone. Rows are independent, so layers that
    share an input may be stacked along `out`. Factorization in float64, the loop over columns in float32. Recorded fallbacks:
    no token (round to nearest), columns whose input was always zero (rounded to nearest), damping raised, no Cholesky factor
    at any damping (round to nearest). Raises ValueError for a weight that is not a finite matrix, that groups do not tile, or
    whose scales do not fit `scale_dtype`, and for statistics that are absent, not finite or of another width.
    """
    matrices = checked_matrices("weight", weights)
    orderings = [_ordering(options, checked_statistics(seen, matrices.shape[2])) for seen in statistics]
    importance = torch.stack([ordering.importance for ordering in orderings])
    grids = options.scale.fit(matrices, format, scale_dtype, importance).unbind()
    codes = _codes(options, matrices, grids, orderings)
    return [
        QuantizationResult(
            weight=grid.round(matrix) if own is None else grid.with_codes(own), fallbacks=ordering.fallbacks
        )
        for matrix, grid, ordering, own in zip(matrices, grids, orderings, codes, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ordering:
    """What a weight's input says of its columns. order: the one to be rounded first, second, ... [in]; importance: of each in
    the search for scales, [in] float32, all alike without a metric, where columns are rounded to nearest."""

    order: Tensor
    metric: Metric | None
    importance: Tensor
    fallbacks: tuple[Fallback, ...]


def _codes(
    options: GPTQ, matrices: Tensor, grids: Sequence[Grid], orderings: Sequence[_Ordering]
) -> list[Tensor | None]:
    """Codes [out, in] int8 of the weights that have a metric, which go through the loop over columns together."""
    found: list[Tensor | None] = [None] * len(matrices)
    metrics = {place: ordering.metric for place, ordering in enumerate(orderings) if ordering.metric is not None}
    if not metrics:
        return found
    columns = Columns(
        [matrices[place] for place in metrics],
        [grids[place] for place in metrics],
        [orderings[place].order for place in metrics],
    )
    rounded = columns.rounded(list(metrics.values()), options.refinement, options.block_size)
    for place, own in zip(metrics, columns.restore(rounded), strict=True):
        found[place] = own
    return found


def _ordering(options: GPTQ, statistics: InputStatistics) -> _Ordering:
    """Beside the Gram matrix one float64 matrix of its size lives at a time, and the two of the metric in float32."""
    power = statistics.product("xx").diagonal() / max(statistics.tokens, 1)
    order = power.argsort(descending=True, stable=True)
    if not options.act_order:
        order = order.sort().values
    dead = int((power <= 0).sum())
    if dead == len(power):
        no_token = Fallback(step="gptq.tokens", cause="no calibration token arrived: rounded to nearest")
        return _Ordering(order=order, metric=None, importance=torch.ones_like(power).float(), fallbacks=(no_token,))
    fallbacks: list[Fallback] = []
    if dead:
        cause = f"{dead} of {len(power)} columns: no input but zero was seen: rounded to nearest"
        fallbacks.append(Fallback(step="gptq.dead_columns", cause=cause))
    damped, feed = power[order], torch.empty(len(power), len(power), device=power.device)
    scales = _factorize(options.damping, statistics, order, damped, feed, fallbacks)
    if scales is None:
        return _Ordering(
            order=order, metric=None, importance=torch.ones_like(power).float(), fallbacks=tuple(fallbacks)
        )
    importance = torch.empty_like(power).index_copy_(0, order, scales.square()).float()
    pull = torch.empty_like(feed)
    _fill(pull, statistics, order, damped)
    pull.diagonal().fill_(1)  # of the damped matrix
    metric = Metric(feed=feed, pull=pull)
    return _Ordering(order=order, metric=metric, importance=importance, fallbacks=tuple(fallbacks))


def _factorize(
    damping_asked: float,
    statistics: InputStatistics,
    order: Tensor,
    power: Tensor,
    feed: Tensor,
    fallbacks: list[Fallback],
) -> Tensor | None:
    """U with U U^T the damped Hessian in rounding order: its diagonal, and U_ij / U_jj into `feed`. power: the Hessian's
    diagonal in this order, which is damped in place. None when no damping makes it positive definite in float64."""
    original, typical = power.clone(), power[power > 0].median()
    # Reversed order turns the lower factor that LAPACK computes into the upper one. A transpose has the layout that LAPACK
    # expects, which then works in place.
    reverse = order.flip(0)
    hessian = torch.empty(len(power), len(power), dtype=torch.float64, device=power.device)
    lower, failed = hessian.T, torch.empty((), dtype=torch.int32, device=power.device)
    for attempt in range(_DAMPING_ATTEMPTS):
        damping = damping_asked * _DAMPING_STEP**attempt
        power.copy_(original + typical * damping)
        _fill(hessian, statistics, reverse)
        hessian.diagonal().copy_(power.flip(0))
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            if attempt:
                cause = f"no Cholesky factor at {damping_asked:g}: raised to {damping:g}"
                fallbacks.append(Fallback(step="gptq.damping", cause=cause))
            scales = lower.diagonal().flip(0)
            strip = _STRIPS[power.device.type]
            for start in range(0, len(power), strip):
                columns = slice(start, min(start + strip, len(power)))
                rows = hessian[len(power) - columns.stop : len(power) - start].flip(0, 1)
                feed[:, columns] = rows.div_(scales[columns].unsqueeze(1)).T
            return scales
    cause = f"no Cholesky factor up to a damping of {damping:g}: rounded to nearest"
    fallbacks.append(Fallback(step="gptq.cholesky", cause=cause))
    return None


def _fill(out: Tensor, statistics: InputStatistics, order: Tensor, by: Tensor | None = None) -> None:
    """E[x x^T] with rows and columns in this order into `out` [in, in] of any float dtype; by: what columns are divided by,
    [in] float64."""
    gram, tokens, width = statistics.product("xx"), max(statistics.tokens, 1), _STRIPS[order.device.type]
    for start in range(0, len(order), width):
        columns = order[start : start + width]
        # Rows are gathered faster than columns, and the matrix is symmetric.
        strip = gram.index_select(0, columns).div_(tokens).T.contiguous().index_select(0, order)
        out[:, start : start + width] = strip if by is None else strip.div_(by[start : start + width])
