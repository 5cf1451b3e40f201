"""The residual store: what quantization (and a low-rank branch) left, in 4 bits, to be fetched by need while decoding.

DecDEC (Park et al., OSDI 2025; called QDEC in its first version). `kernels/residual.py` says what is computed from a store;
here one is made from a residual and from what calibration saw of the layer's input, and its effect is emulated for
validation. The paper corrects decoded tokens only; for perplexity it corrects every position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.residual import ResidualStore, compensate, select_chunked, select_exact, select_static
from workers.quantization.inputs import checked_matrix
from workers.recipe.residual import Residual

_CHUNK_ELEMENTS = 1 << 16
"""Entries that are searched at a time on a CPU: its second-level cache."""


class Thresholds:
    """For each rank 1 .. in, the largest magnitude that had that rank within a token (DecDEC's calibration).

    Maxima: any split of the tokens and any order of merging give the same bits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._largest = torch.zeros(width, device=device)

    def observe(self, rows: Tensor) -> None:
        """Takes in tokens [..., in]; ValueError for another width and for values that are not finite."""
        width = self._largest.shape[0]
        if rows.shape[-1] != width:
            raise ValueError(f"rows: width {rows.shape[-1]}: expected {width}, the layer's input channels")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("rows: hold NaN or infinity: expected finite activations")
        if rows.numel():
            ranked = rows.reshape(-1, width).float().abs().sort(dim=1, descending=True).values
            torch.maximum(self._largest, ranked.amax(0), out=self._largest)

    def merge(self, other: Tensor) -> None:
        """Takes in the `result` [in] of other shards; ValueError for another width."""
        if other.shape != self._largest.shape:
            raise ValueError(
                f"thresholds of width {other.shape[0]} cannot join thresholds of width {self._largest.shape[0]}"
            )
        torch.maximum(self._largest, other, out=self._largest)

    def result(self) -> Tensor:
        """The thresholds so far, [in] float32, descending; zeros when no token was seen."""
        return self._largest.clone()


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


def select(x: Tensor, store: ResidualStore, options: Residual, importance: Tensor | None = None) -> Tensor:
    """The channels of each token of x [..., in] that `options` correct: bool, [..., in], or [in] when static.

    importance: [in], E[x^2] on the calibration tokens; ValueError when a static selection has none.
    """
    k = options.channels(store.in_features)
    match options.selection:
        case "chunked":
            return select_chunked(x, options.channels_per_chunk, store.thresholds)
        case "exact":
            return select_exact(x, k)
        case "static":
            if importance is None:
                raise ValueError("importance: none: a static selection needs E[x^2] of the layer's input")
            return select_static(importance, k)


def correction(
    x: Tensor,
    store: ResidualStore,
    options: Residual,
    *,
    importance: Tensor | None = None,
    decoded: Tensor | None = None,
) -> Tensor:
    """What the store adds to a layer's output for x [..., in]: [..., out] float32.

    decoded: bool [...], the tokens that are corrected: those that are generated one by one. None corrects all of them, as
    the paper does for perplexity. importance: as in `select`.
    """
    selected = select(x, store, options, importance)
    if decoded is not None:
        selected = selected & decoded.unsqueeze(-1)
    return compensate(x, store, selected)


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
