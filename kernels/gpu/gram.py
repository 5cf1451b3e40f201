"""Second moments of a layer's input, summed in float32: half of the products of x^T x, for it is symmetric."""

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
    tokens, width = x.shape if x.ndim == 2 else (0, 0)
    if x.ndim != 2 or x.stride(1) != 1 or not launch.runs_on(x.device):
        raise ValueError(
            f"x: {list(x.shape)}, strides {x.stride()}, on {x.device}: expected [tokens, in], contiguous, where kernels run"
        )
    if gram.shape != (width, width) or gram.dtype is not torch.float32 or not gram.is_contiguous():
        raise ValueError(f"gram: {list(gram.shape)} {gram.dtype}: expected {[width, width]} float32, contiguous")
    if gram.device != x.device:
        raise ValueError(f"gram: on {gram.device}: expected {x.device}")
    constants = launch.arithmetic(x.dtype)
    blocks = BLOCKS_FLOAT32 if x.dtype is torch.float32 else BLOCKS_16_BIT
    tiles = triton.cdiv(width, blocks["TILE"])
    with launch.current(x.device):
        gram_kernel[(tiles, tiles)](
            gram,
            x,
            tokens,
            width,
            x.stride(0),
            float(scale),
            COMPUTE=constants["COMPUTE"],
            PRECISION=constants["PRECISION"],
            **blocks,
        )
    return gram


@triton.jit
def gram_kernel(
    gram,
    x,
    tokens,
    width,
    x_stride,
    scale,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grid (tiles, tiles), of which those above the diagonal have nothing to do. A program sums its tile over all tokens."""
    row_tile = tl.program_id(0)
    column_tile = tl.program_id(1)
    if column_tile > row_tile:
        return
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < tokens
        start = token.to(tl.int64) * x_stride
        rows = tl.load(x + start[None, :] + row[:, None], mask=inside[None, :] & (row < width)[:, None], other=0.0)
        columns = tl.load(
            x + start[:, None] + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0
        )
        total = tl.dot(rows.to(COMPUTE), columns.to(COMPUTE), total, input_precision=PRECISION)
    to = gram + row.to(tl.int64)[:, None] * width + column[None, :]
    below = (row < width)[:, None] & (column[None, :] <= row[:, None])
    tl.store(to, tl.load(to, mask=below, other=0.0) + total * scale, mask=below)
