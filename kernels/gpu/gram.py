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

BLOCKS_16_BIT = {"TOKENS": 64, "TILE": 128, "num_warps": 8, "num_stages": 3}
"""16-bit input: two warpgroups on a tile of 128 x 128, 96 KB of shared memory, which an sm_89 has."""

BLOCKS_FLOAT32 = {"TOKENS": 32, "TILE": 64, "num_warps": 8, "num_stages": 2}
"""float32 is multiplied without tensor cores; a larger tile spills."""


def add_gram_(gram: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """gram += scale * sum over tokens of x x^T, the lower triangle alone: what is above is left as it is. Returns gram.

    gram: [in, in] float32, contiguous. x: [tokens, in] float16, bfloat16 or float32, rows contiguous. Products and sums are
    float32, in the order of the tokens: the same bits each time. For many tokens, sum the results of shards in float64.
    ValueError for anything else.
    """
    _check("x", x, x)
    _add_(gram, x, x, float(scale), lower=True)
    return gram


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """total += sum over tokens of x y^T. Returns total.

    total: [in, in'] float32, contiguous. x: [tokens, in], y: [tokens, in'], both float16, bfloat16 or float32 alike, rows
    contiguous. Products and sums as in `add_gram_`. ValueError for anything else.
    """
    _check("x", x, x)
    _check("y", y, x)
    _add_(total, x, y, 1.0, lower=False)
    return total


def _check(name: str, rows: Tensor, like: Tensor) -> None:
    if rows.ndim != 2 or rows.stride(1) != 1 or not launch.runs_on(rows.device):
        found = f"{list(rows.shape)}, strides {rows.stride()}, on {rows.device}"
        raise ValueError(f"{name}: {found}: expected [tokens, in], contiguous, where kernels run")
    if rows.dtype is not like.dtype or len(rows) != len(like) or rows.device != like.device:
        found = f"{len(rows)} tokens in {rows.dtype} on {rows.device}"
        raise ValueError(f"{name}: {found}: expected {len(like)} in {like.dtype} on {like.device}")


def _add_(total: Tensor, x: Tensor, y: Tensor, scale: float, *, lower: bool) -> None:
    shape = (x.shape[1], y.shape[1])
    if total.shape != shape or total.dtype is not torch.float32 or not total.is_contiguous():
        raise ValueError(f"gram: {list(total.shape)} {total.dtype}: expected {list(shape)} float32, contiguous")
    if total.device != x.device:
        raise ValueError(f"gram: on {total.device}: expected {x.device}")
    constants = launch.arithmetic(x.dtype)
    blocks = BLOCKS_FLOAT32 if x.dtype is torch.float32 else BLOCKS_16_BIT
    with launch.current(x.device):
        gram_kernel[tuple(triton.cdiv(width, blocks["TILE"]) for width in shape)](
            total,
            x,
            y,
            len(x),
            *shape,
            x.stride(0),
            y.stride(0),
            scale,
            LOWER=lower,
            COMPUTE=constants["COMPUTE"],
            PRECISION=constants["PRECISION"],
            **blocks,
        )


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
    scale,
    LOWER: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grid (tiles, tiles). A program sums its tile over all tokens. LOWER: those above the diagonal have nothing to do."""
    row_tile = tl.program_id(0)
    column_tile = tl.program_id(1)
    if LOWER & (column_tile > row_tile):
        return
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.range(0, tokens, TOKENS):
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)
        inside = token < tokens
        rows = tl.load(
            x + token[None, :] * x_stride + row[:, None], mask=inside[None, :] & (row < x_width)[:, None], other=0.0
        )
        columns = tl.load(
            y + token[:, None] * y_stride + column[None, :],
            mask=inside[:, None] & (column < y_width)[None, :],
            other=0.0,
        )
        sums = tl.dot(rows.to(COMPUTE), columns.to(COMPUTE), sums, input_precision=PRECISION)
    to = total + row.to(tl.int64)[:, None] * y_width + column[None, :]
    kept = (row < x_width)[:, None] & (column < y_width)[None, :]
    if LOWER:
        kept = kept & (column[None, :] <= row[:, None])
    tl.store(to, tl.load(to, mask=kept, other=0.0) + sums * scale, mask=kept)
