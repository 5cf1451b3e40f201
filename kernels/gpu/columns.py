"""The two loops over the columns of a block of weights: error feedback and coordinate descent, a kernel a block.

Each output channel goes its own way through the columns, so a program takes some channels through all of them: what later
columns must know of earlier ones stays in registers, and nothing is started column by column. The same in torch, which says
what is computed: `kernels.columns`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Bodies of kernels have no types that Python knows; the functions that launch them do.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.columns import ColumnGrid
from counterweight.kernels.gpu import launch

MOST_COLUMNS = 64
"""Of a block. A thread holds a column of its tile in registers; 128 of them spill."""

CHANNELS, WARPS = 32, 1
"""Of a program. Few: 4096 output channels are then 128 programs, as many as a GPU has multiprocessors."""


def feed_back_(codes: Tensor, error: Tensor, *, target: Tensor, aim: Tensor, feed: Tensor, grid: ColumnGrid) -> None:
    """Rounds the columns of a block one after the other, each to the code nearest to its aim, and passes its error on to the
    aims of those behind it; fills in `codes` and `error`.

    codes, error, target, aim: [weights, columns, out] float32, at most `MOST_COLUMNS` columns, each column of a weight
    contiguous; codes are centred. feed: [weights, columns, columns] float32, contiguous: what column j's error counts in the
    aim of column k > j stands in row j. ValueError for anything else.
    """
    _check(grid, codes=codes, error=error, target=target, aim=aim, feed=feed)
    _launch(codes, error, target, aim, feed, grid, descent=False)


def descend_(codes: Tensor, error: Tensor, *, before: Tensor, slope: Tensor, pull: Tensor, grid: ColumnGrid) -> None:
    """Sets each column of a block in turn to its best codes given all the others; fills in `codes` and keeps `error`, target
    minus value, up to date.

    codes, error, before (the codes so far), slope (of the objective, over H_jj): [weights, columns, out] float32 as in
    `feed_back_`. pull: [weights, columns, columns]: what a change of column j takes off the slope of column k > j stands in row
    j. ValueError for anything else.
    """
    _check(grid, codes=codes, error=error, before=before, slope=slope, feed=pull)
    _launch(codes, error, before, slope, pull, grid, descent=True)


def _launch(
    codes: Tensor, error: Tensor, base: Tensor, start: Tensor, within: Tensor, grid: ColumnGrid, *, descent: bool
) -> None:
    weights, columns, channels = codes.shape
    zeros = grid.steps if grid.zeros is None else grid.zeros
    with launch.current(codes.device):
        columns_kernel[(triton.cdiv(channels, CHANNELS), weights)](
            codes,
            error,
            base,
            start,
            within,
            grid.steps,
            zeros,
            *(tensor.stride(0) for tensor in (codes, error, base, start)),
            *grid.steps.stride()[:2],
            *zeros.stride()[:2],
            columns,
            channels,
            float(grid.lowest),
            float(grid.highest),
            DESCENT=descent,
            ZEROS=grid.zeros is not None,
            COLUMNS=triton.next_power_of_2(columns),
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )


def _check(grid: ColumnGrid, *, codes: Tensor, feed: Tensor, **others: Tensor) -> None:
    weights, columns, channels = codes.shape
    if not 1 <= columns <= MOST_COLUMNS or not launch.runs_on(codes.device):
        raise ValueError(f"codes: {columns} columns on {codes.device}: expected 1 .. {MOST_COLUMNS}, where kernels run")
    for name, tensor in {"codes": codes, **others}.items():
        if tensor.shape != codes.shape or tensor.dtype is not torch.float32 or tensor.device != codes.device:
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype}: expected {list(codes.shape)} float32")
        if tensor.stride()[1:] != (channels, 1):
            raise ValueError(f"{name}: strides {tensor.stride()}: expected contiguous columns")
    if feed.shape != (weights, columns, columns) or feed.dtype is not torch.float32 or not feed.is_contiguous():
        raise ValueError(f"feed, pull: {list(feed.shape)} {feed.dtype}: expected {[weights, columns, columns]} float32")
    for tensor in (grid.steps, *(() if grid.zeros is None else (grid.zeros,))):
        if tensor.shape != codes.shape or tensor.dtype is not torch.float32 or tensor.stride(2) != 1:
            raise ValueError(f"grid: {list(tensor.shape)} {tensor.dtype}: expected {list(codes.shape)} float32")


@triton.jit
def _rounded(value, low, high):
    """The nearest code between `low` and `high`, half to even."""
    value = tl.minimum(tl.maximum(value, -4194304.0), 4194304.0)
    value = (value + 12582912.0) - 12582912.0  # near 1.5 * 2**23 a float32 has no bits for fractions
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _row(tile, place, column):
    """Row `place` of a tile [columns, channels]: a sum of it and of zeros."""
    return tl.sum(tl.where((column == place)[:, None], tile, 0.0), axis=0)


@triton.jit
def columns_kernel(
    codes,
    error,
    base,
    start,
    within,
    steps,
    zeros,
    codes_stride,
    error_stride,
    base_stride,
    start_stride,
    steps_stride,
    step_stride,
    zeros_stride,
    zero_stride,
    columns,
    channels,
    lowest,
    highest,
    DESCENT: tl.constexpr,
    ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """grid (channels, weights). base, start, within: target, aim, feed; with DESCENT before, slope, pull."""
    weight = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.arange(0, COLUMNS)
    inside = channel < channels
    tile = tl.load(
        start + weight * start_stride + column[:, None] * channels + channel[None, :],
        mask=(column < columns)[:, None] & inside[None, :],
        other=0.0,
    )
    for place in tl.range(0, columns):
        at = place * channels + channel
        step = tl.load(steps + weight * steps_stride + place * step_stride + channel, mask=inside, other=1.0)
        zero = tl.zeros((CHANNELS,), tl.float32)
        if ZEROS:
            zero = tl.load(zeros + weight * zeros_stride + place * zero_stride + channel, mask=inside, other=0.0)
        given = tl.load(base + weight * base_stride + at, mask=inside, other=0.0)
        value = tl.div_rn(_row(tile, place, column), step)
        to = error + weight * error_stride + at
        if DESCENT:
            code = _rounded(given + value, lowest - zero, highest - zero)
            moved = (given - code) * step
            left = tl.load(to, mask=inside, other=0.0) + moved
        else:
            code = _rounded(value, lowest - zero, highest - zero)
            moved = given - code * step
            left = moved
        tl.store(codes + weight * codes_stride + at, code, mask=inside)
        tl.store(to, left, mask=inside)
        behind = (column > place) & (column < columns)
        counts = tl.load(within + (weight * columns + place) * columns + column, mask=behind, other=0.0)
        tile += counts[:, None] * moved[None, :]
