"""The residual store: what quantization (and a low-rank branch) left, in 4 bits, to be fetched by need while decoding.

DecDEC (Park et al., OSDI 2025; called QDEC in its first version). `kernels/residual.py` says what is computed from a store;
here one is made from a residual and from what calibration saw of the layer's input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.residual import ResidualStore
from counterweight.workers.methods.residual import Residual
from counterweight.workers.quantization.inputs import checked_matrix

_CHUNK_ELEMENTS = 1 << 16
"""Entries that are searched at a time on a CPU: its second-level cache."""


def residual_store(
    residual: Tensor, thresholds: Tensor, options: Residual, *, scale_dtype: torch.dtype = torch.float32
) -> ResidualStore:
    """`residual` [out, in] = W - W' in `options.bits` bits: a symmetric grid per output channel, found by grid search.

    The scale of a row is, among s_j = j / n * max|r| / highest code, j = 1 .. n, the one with the least squared error in
    float32, the smallest of equals; each is rounded to `scale_dtype` before it is tried. A row of zeros has scale 1.
    thresholds: [in], of the layer's input as it arrives (`Thresholds`). W' includes the low-rank branch, if there is one.
    Raises ValueError for a residual that is not a finite matrix, for thresholds that are not finite, descending and of its
    width, and for a scale that does not fit its dtype.
    """
    residual = checked_matrix("residual", residual)
    _check_thresholds(thresholds, residual.shape[1])
    rows_at_once = residual.shape[0] if residual.is_cuda else max(1, _CHUNK_ELEMENTS // residual.shape[1])
    highest = (1 << (options.bits - 1)) - 1
    scale = torch.cat([_scale(rows, highest, options.candidates, scale_dtype) for rows in residual.split(rows_at_once)])
    if not bool(torch.isfinite(scale).all()):
        row = int((~torch.isfinite(scale.squeeze(1))).nonzero()[0])
        raise ValueError(f"residual: output channel {row}: no scale in {scale_dtype} can hold values this large")
    codes = (residual / scale.float()).round_().clamp_(-highest, highest).to(torch.int8)
    return ResidualStore.of(codes, scale.squeeze(1), thresholds, bits=options.bits)


def _scale(rows: Tensor, highest: int, candidates: int, dtype: torch.dtype) -> Tensor:
    """The scale [rows, 1] of each of `rows` [rows, in], in the stored dtype."""
    widest = rows.abs().amax(dim=1, keepdim=True) / highest
    least, error = torch.full_like(widest, torch.inf), torch.empty_like(rows)
    best = least.to(dtype)
    # The smallest subnormal: what 8-bit weights leave in float16 needs scales below its smallest normal number.
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for candidate in range(1, candidates + 1):
        scale = (widest * (candidate / candidates)).to(dtype).clamp_min(smallest)
        step = scale.float()
        torch.div(rows, step, out=error).round_().clamp_(-highest, highest).mul_(step).sub_(rows)
        total = error.square_().sum(dim=1, keepdim=True)
        better = total < least
        best, least = torch.where(better, scale, best), torch.where(better, total, least)
    return best.masked_fill(widest == 0, 1)


def _check_thresholds(thresholds: Tensor, columns: int) -> None:
    if tuple(thresholds.shape) != (columns,):
        raise ValueError(f"thresholds: {list(thresholds.shape)}: expected [{columns}], one per input channel")
    finite = bool(torch.isfinite(thresholds).all())
    if not finite or bool((thresholds < 0).any()) or bool((thresholds.diff() > 0).any()):
        raise ValueError("thresholds: expected finite magnitudes in descending order, as `Thresholds` gathers them")
