"""Second moments of a layer's input, summed in float32: half of the products of x^T x, for it is symmetric; and x^T y of two
inputs of the same tokens."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Bodies of kernels have no types that Python knows; the functions that launch them do.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.grouped import Places

STRIP = 128
"""Rows of a strip of a packed triangle, as `workers.calibration.triangle` has them."""

BLOCKS_HOPPER = {"TOKENS": 64, "TILE": 128, "num_warps": 4, "num_stages": 4}
"""16-bit input on Hopper: 8192 tokens of 4096 and of 14336 channels take 243 and 3507 us on an H200; with the blocks below, and
masks, 316 and 4107."""

BLOCKS_16_BIT = {"TOKENS": 64, "TILE": 128, "num_warps": 8, "num_stages": 3}
"""16-bit input elsewhere: two warpgroups on a tile of 128 x 128, 96 KB of shared memory, which an sm_89 has."""

BLOCKS_FLOAT32 = {"TOKENS": 32, "TILE": 64, "num_warps": 8, "num_stages": 2}
"""float32 is multiplied without tensor cores; a larger tile spills."""


def add_gram_(entries: Tensor, x: Tensor) -> Tensor:
    """Adds sum over tokens of x x^T to the lower triangle of a matrix [in, in]: of float64, held by strips of `STRIP` rows one
    after the other, of rows `start` to `stop` the first `stop` columns; what is above the diagonal there is left as it is.
    Returns entries.

    entries: float64, contiguous. x: [tokens, in] float16, bfloat16 or float32, rows contiguous. Products and their sums over
    the tokens are float32, in the order of the tokens: the same bits each time. ValueError for anything else.
    """
    _check("x", x, x)
    _add_(entries, _packed_shape(x.shape[1]), x, x, packed=True)
    return entries


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """total += sum over tokens of x y^T. Returns total.

    total: [in, in'] float64, contiguous. x: [tokens, in], y: [tokens, in'], both float16, bfloat16 or float32 alike, rows
    contiguous. Products and sums as in `add_gram_`. ValueError for anything else.
    """
    _check("x", x, x)
    _check("y", y, x)
    _add_(total, (x.shape[1], y.shape[1]), x, y, packed=False)
    return total


def add_grams_(totals: Places, x: Tensor, bounds: Tensor) -> None:
    """`add_gram_` of each group of rows, in one launch: rows from bounds[g] to bounds[g + 1] are added to total g. totals: of
    triangles; groups that have none are left out. bounds: int64 [groups + 1], ascending, on the device."""
    _check("x", x, x)
    _add_(totals.first, _packed_shape(x.shape[1]), x, x, packed=True, places=totals, bounds=bounds)


def add_products_(totals: Places, x: Tensor, y: Tensor, bounds: Tensor) -> None:
    """`add_product_` of each group of rows, as `add_grams_` does it."""
    _check("x", x, x)
    _check("y", y, x)
    _add_(totals.first, (x.shape[1], y.shape[1]), x, y, packed=False, places=totals, bounds=bounds)


def _packed_shape(width: int) -> tuple[int]:
    strips = width // STRIP
    # Whole strips, then what is left.
    return (STRIP * STRIP * strips * (strips + 1) // 2 + (width - STRIP * strips) * width,)


def _check(name: str, rows: Tensor, like: Tensor) -> None:
    if rows.ndim != 2 or rows.stride(1) != 1 or not launch.runs_on(rows.device):
        found = f"{list(rows.shape)}, strides {rows.stride()}, on {rows.device}"
        raise ValueError(f"{name}: {found}: expected [tokens, in], contiguous, where kernels run")
    if rows.dtype is not like.dtype or len(rows) != len(like) or rows.device != like.device:
        found = f"{len(rows)} tokens in {rows.dtype} on {rows.device}"
        raise ValueError(f"{name}: {found}: expected {len(like)} in {like.dtype} on {like.device}")


def _add_(
    total: Tensor,
    shape: tuple[int, ...],
    x: Tensor,
    y: Tensor,
    *,
    packed: bool,
    places: Places | None = None,
    bounds: Tensor | None = None,
) -> None:
    """places, bounds: of groups; None: all rows are one."""
    if total.shape != shape or total.dtype is not torch.float64 or not total.is_contiguous():
        raise ValueError(f"total: {list(total.shape)} {total.dtype}: expected {list(shape)} float64, contiguous")
    if total.device != x.device:
        raise ValueError(f"total: on {total.device}: expected {x.device}")
    constants = launch.arithmetic(x.dtype)
    blocks = blocks_of(x.dtype, launch.major_of(x.device))
    groups = 1 if places is None else len(places.elements)
    if bounds is not None and (bounds.shape != (groups + 1,) or bounds.dtype is not torch.int64):
        raise ValueError(f"bounds: {list(bounds.shape)} {bounds.dtype}: expected [{groups + 1}] int64")
    grid = (*(triton.cdiv(stream.shape[1], blocks["TILE"]) for stream in (x, y)), groups)
    with launch.current(x.device):
        gram_kernel[grid](
            total,
            x,
            y,
            len(x),
            x.shape[1],
            y.shape[1],
            x.stride(0),
            y.stride(0),
            places=None if places is None else places.elements,
            bounds=bounds,
            PACKED=packed,
            EVEN=all(stream.shape[1] % blocks["TILE"] == 0 for stream in (x, y)),
            STRIP=STRIP,
            COMPUTE=constants["COMPUTE"],
            PRECISION=constants["PRECISION"],
            **blocks,
        )


def blocks_of(dtype: torch.dtype, major: int) -> dict[str, int]:
    """Constants and options of the kernel for inputs of `dtype` on compute capability `major`."""
    if dtype is torch.float32:
        return BLOCKS_FLOAT32
    return BLOCKS_HOPPER if major == 9 else BLOCKS_16_BIT


@triton.jit
def gram_kernel(
    total,
    x,
    y,
    tokens,
    x_width,
    y_width,
    x_stride,
    y_stride,
    places,
    bounds,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
    STRIP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grid (tiles, tiles, groups). A program sums its tile over all tokens of its group in float32 and adds it in float64.
    PACKED: to the lower triangle, see `add_gram_`; programs above the diagonal have nothing to do. EVEN: whether all tiles are
    whole. places, bounds: see `add_grams_`; None: there is one group, of all tokens."""
    row_tile = tl.program_id(0)
    column_tile = tl.program_id(1)
    if PACKED & (column_tile > row_tile):
        return
    if bounds is not None:
        group = tl.program_id(2)
        place, begin = tl.load(places + group), tl.load(bounds + group)
        tokens = (tl.load(bounds + group + 1) - begin).to(tl.int32)
        if (place < 0) | (tokens == 0):
            return
        total += tl.multiple_of(place, 2)
        x += begin * x_stride
        y += begin * y_stride
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    token = tl.arange(0, TOKENS).to(tl.int64)
    rows = x + (token[:, None] * x_stride + row[None, :])
    columns = y + (token[:, None] * y_stride + column[None, :])
    sums = tl.zeros((TILE, TILE), tl.float32)
    whole = tokens // TOKENS * TOKENS
    for _ in tl.range(0, whole, TOKENS):
        if EVEN:
            left, right = tl.load(rows), tl.load(columns)
        else:
            left = tl.load(rows, mask=(row < x_width)[None, :], other=0.0)
            right = tl.load(columns, mask=(column < y_width)[None, :], other=0.0)
        sums = tl.dot(tl.trans(left.to(COMPUTE)), right.to(COMPUTE), sums, input_precision=PRECISION)
        rows += TOKENS * x_stride
        columns += TOKENS * y_stride
    if whole < tokens:
        inside = (whole + token < tokens)[:, None]
        left = tl.load(rows, mask=inside & (row < x_width)[None, :], other=0.0)
        right = tl.load(columns, mask=inside & (column < y_width)[None, :], other=0.0)
        sums = tl.dot(tl.trans(left.to(COMPUTE)), right.to(COMPUTE), sums, input_precision=PRECISION)
    # The tile's first entry by 64 bits; within a tile 32 are enough, and take half of the registers.
    first_row = row_tile.to(tl.int64) * TILE
    stride = y_width
    if PACKED:
        strip = first_row // STRIP
        stride = tl.minimum((strip.to(tl.int32) + 1) * STRIP, y_width)
        first_row -= strip * STRIP
        total += strip * (strip + 1) // 2 * STRIP * STRIP
    total += first_row * stride
    # An eighth at a time: its float64 entries take twice the registers of the sums.
    local = row - row_tile * TILE
    first, second = _halves(sums, TILE, TILE)
    _add_quarters(total, first, local, row, column_tile * TILE, stride, x_width, y_width, PACKED, TILE, TILE // 2)
    middle = column_tile * TILE + TILE // 2
    _add_quarters(total, second, local, row, middle, stride, x_width, y_width, PACKED, TILE, TILE // 2)


@triton.jit
def _add_quarters(
    total,
    sums,
    local,
    row,
    column,
    stride,
    x_width,
    y_width,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sums [ROWS, COLUMNS], whose first column is `column`, in four parts."""
    first, second = _halves(sums, ROWS, COLUMNS)
    PART: tl.constexpr = COLUMNS // 4
    for half in tl.static_range(2):
        left, right = _halves(first if half == 0 else second, ROWS, COLUMNS // 2)
        columns = column + half * (COLUMNS // 2) + tl.arange(0, PART)
        _add(total, left, local, row, columns, stride, x_width, y_width, PACKED)
        _add(total, right, local, row, columns + PART, stride, x_width, y_width, PACKED)


@triton.jit
def _halves(sums, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of sums [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _add(total, sums, local, row, column, stride, x_width, y_width, PACKED: tl.constexpr):
    to = total + (local[:, None] * stride + column[None, :])
    kept = (row < x_width)[:, None] & (column < y_width)[None, :]
    if PACKED:
        kept = kept & (column[None, :] <= row[:, None])
    tl.store(to, tl.load(to, mask=kept, other=0.0) + sums.to(tl.float64), mask=kept)
