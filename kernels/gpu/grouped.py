"""Products of rows that are sorted by group, each group's by a weight of its own, in one launch: a sparse MLP's experts, of
which each takes a GPU less time than its launch takes the host.

Weights lie where they are: a kernel is given the first of them, and how far the others are from it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Bodies of kernels have no types that Python knows; the functions that launch them do.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.gpu import launch

ALIGNED = 32
"""Bytes: every tensor of a `Places` begins at a multiple, so that kernels read 16 of them at a time."""

BLOCKS = {"TOKENS": 128, "TILE": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
TOGETHER = 8
"""Tiles of rows that take a tile of a weight one after the other, while it is in the cache."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where tensors of one dtype and device lie. first: the one that comes first in memory. elements: int64 [tensors], from
    there to each; negative for none."""

    first: Tensor
    elements: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> Places | None:
        """None where they are not alike, or do not begin at a multiple of `ALIGNED` bytes, or where there is none."""
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        first = min(present, key=Tensor.data_ptr)
        start, size = first.data_ptr(), first.element_size()
        form = first.shape, first.stride(), first.dtype, first.device
        if any((one.shape, one.stride(), one.dtype, one.device) != form for one in present):
            return None
        pointers = [start - size if tensor is None else tensor.data_ptr() for tensor in tensors]
        if any(pointer % ALIGNED for pointer, tensor in zip(pointers, tensors, strict=True) if tensor is not None):
            return None
        elements = torch.tensor([(pointer - start) // size for pointer in pointers], dtype=torch.int64)
        return cls(first, elements.to(first.device, non_blocking=True))


def grouped_linear(x: Tensor, bounds: Tensor, weights: Places) -> Tensor:
    """x [rows, in] -> [rows, out]: rows from bounds[g] to bounds[g + 1] times the transposed weight g.

    bounds: int64 [groups + 1], ascending, on the device, where nobody waits for it; rows outside are zeros. weights: of
    [out, in], rows contiguous, in the dtype of x: float16, bfloat16 or float32; sums are float32. ValueError for anything else.
    """
    weight = weights.first
    if weight.ndim != 2 or weight.stride(1) != 1 or weight.dtype is not x.dtype or weight.device != x.device:
        raise ValueError(f"weights: {list(weight.shape)} {weight.dtype}: expected [out, in] {x.dtype}, rows contiguous")
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[1] != weight.shape[1] or not launch.runs_on(x.device):
        raise ValueError(f"x: {list(x.shape)} on {x.device}: expected [rows, {weight.shape[1]}] where kernels run")
    groups = len(weights.elements)
    if bounds.shape != (groups + 1,) or bounds.dtype is not torch.int64:
        raise ValueError(f"bounds: {list(bounds.shape)} {bounds.dtype}: expected [{groups + 1}] int64")
    out = x.new_zeros(len(x), weight.shape[0])
    tiles = -(bounds.diff() // -BLOCKS["TOKENS"])
    begins = torch.cat([bounds.new_zeros(1), tiles.cumsum(0)])
    # Every group's last tile may be padding but for one row.
    most = len(x) // BLOCKS["TOKENS"] + min(len(x), groups)
    wide = triton.cdiv(weight.shape[0], BLOCKS["TILE"])
    constants = launch.arithmetic(x.dtype)
    with launch.current(x.device):
        grouped_linear_kernel[(triton.cdiv(most, TOGETHER) * TOGETHER * wide,)](
            out,
            x,
            weight,
            weights.elements,
            bounds,
            begins,
            groups,
            weight.shape[0],
            x.shape[1],
            x.stride(0),
            weight.stride(0),
            GROUPS=triton.next_power_of_2(groups + 1),
            TOGETHER=TOGETHER,
            EVEN=x.shape[1] % BLOCKS["DEPTH"] == 0 and weight.shape[0] % BLOCKS["TILE"] == 0,
            COMPUTE=constants["COMPUTE"],
            PRECISION=constants["PRECISION"],
            **BLOCKS,
        )
    return out


@triton.jit
def grouped_linear_kernel(
    out,
    x,
    weight,
    places,
    bounds,
    begins,
    groups,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    GROUPS: tl.constexpr,
    TOGETHER: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grid (tiles of rows * tiles of outputs). begins: int64 [groups + 1], of each group its first tile of rows; programs
    behind the last one have nothing to do. EVEN: whether all tiles of a weight are whole."""
    wide = tl.cdiv(outputs, TILE)
    program = tl.program_id(0)
    tile = program // (TOGETHER * wide) * TOGETHER + program % TOGETHER
    column_tile = program % (TOGETHER * wide) // TOGETHER
    if tile >= tl.load(begins + groups):
        return
    number = tl.arange(0, GROUPS)
    begun = tl.load(begins + number, mask=number <= groups, other=1 << 62)
    group = tl.sum((begun <= tile).to(tl.int32)) - 1
    first = tl.load(bounds + group) + (tile - tl.load(begins + group)) * TOKENS
    left = tl.load(bounds + group + 1) - first  # rows of the group from here on
    row, column, depth = tl.arange(0, TOKENS), column_tile * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    # A row that is not the group's reads its last one, so that no load of a whole tile needs a mask.
    read = first + tl.minimum(row, left - 1)
    rows = x + (read[:, None] * x_stride + depth[None, :])
    place = tl.multiple_of(tl.load(places + group), 8)
    columns = weight + place + (tl.minimum(column, outputs - 1).to(tl.int64)[:, None] * weight_stride + depth[None, :])
    sums = tl.zeros((TOKENS, TILE), tl.float32)
    for done in tl.range(0, inputs, DEPTH):
        if EVEN:
            values, weights = tl.load(rows), tl.load(columns)
        else:
            kept = (done + depth < inputs)[None, :]
            values, weights = tl.load(rows, mask=kept, other=0.0), tl.load(columns, mask=kept, other=0.0)
        sums = tl.dot(values.to(COMPUTE), tl.trans(weights.to(COMPUTE)), sums, input_precision=PRECISION)
        rows += DEPTH
        columns += DEPTH
    to = out + ((first + row)[:, None] * outputs + column[None, :])
    tl.store(to, sums.to(out.dtype.element_ty), mask=(row < left)[:, None] & (column < outputs)[None, :])
