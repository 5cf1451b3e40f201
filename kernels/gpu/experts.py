"""Mixture of experts: each token times the integer weights of the experts that its router chose, all in one launch.

A (token, choice) pair is a slot, numbered token * top_k + choice. `align_tokens` puts slots of the same expert into blocks; a
program takes one block and one tile of its expert's weight, by the same device functions as `weight_gemm`.
"""

# Bodies of jit functions hold values of the triton language; they carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.layout import PackedWeight, PreparedInput
from counterweight.kernels.gpu.partials import summed_over
from counterweight.kernels.gpu.weight_gemm import Tiling, check, multiply_into, splits_of, tiling_of
from counterweight.kernels.gpu.weight_tile import finish_tile

__all__ = [
    "Routing",
    "align_tokens",
    "block_of",
    "expert_gemm",
    "project_experts",
    "project_kernel",
    "projection_tiling",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Slots in the order of their experts, each expert's padded to whole blocks. Sizes depend on shapes alone.

    slots: [blocks * block] int32, `tokens * top_k` in places without one. expert_of_block: [blocks] int32, the number of
    experts for blocks that are not needed. expert_of: [tokens, top_k] int64, as the router chose. experts: how many.
    """

    slots: Tensor
    expert_of_block: Tensor
    expert_of: Tensor
    experts: int
    block: int


def block_of(
    slots: int, weight: PackedWeight, *, dtype: torch.dtype, device: torch.device, decoding: bool | None = None
) -> int:
    """The block for `align_tokens` that suits `slots` slots of inputs of this dtype, shared evenly by the experts.

    It is the same for all weights of a layer's experts that have the same number of experts. decoding: see `weight_gemm`.
    """
    share = -(-slots // (weight.experts or 1))
    return tiling_of(share, weight, dtype=dtype, device=device, decoding=decoding).bm


def projection_tiling(block: int) -> Tiling:
    """Tile of `project_experts` for blocks of `block` slots, over bk columns at a time. Ranks are small: narrow tiles make more
    programs, each with long runs of columns in flight."""
    if block <= 32:
        return Tiling(bm=block, bn=64, bk=128, warps=4, stages=3)
    return Tiling(bm=block, bn=64, bk=32, warps=4 if block == 64 else 8, stages=3)


def align_tokens(expert_of: Tensor, experts: int, block: int) -> Routing:
    """Sorts the slots of expert_of [tokens, top_k], integers in 0 .. experts - 1, into blocks of one expert each.

    Nothing is read back and all sizes follow from shapes, so it can be part of a CUDA graph; hence numbers outside the range
    are not noticed.
    """
    slots, device = expert_of.numel(), expert_of.device
    # Every expert's last block may be padding but for one slot.
    blocks = slots // block + min(slots, experts)
    ordered, order = torch.sort(expert_of.reshape(-1).long(), stable=True)
    first = torch.searchsorted(ordered, torch.arange(experts + 1, device=device))
    needed = (first.diff() + block - 1) // block
    last_block = needed.cumsum(0)
    place = torch.arange(slots, device=device) - first[ordered] + (last_block - needed)[ordered] * block
    places = torch.full((blocks * block,), slots, dtype=torch.int32, device=device)
    places.scatter_(0, place, order.int())
    return Routing(
        slots=places,
        expert_of_block=torch.searchsorted(last_block, torch.arange(blocks, device=device), right=True).int(),
        expert_of=expert_of.long(),
        experts=experts,
        block=block,
    )


def expert_gemm(
    x: PreparedInput,
    weight: PackedWeight,
    routing: Routing,
    *,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    splits: int | None = None,
) -> Tensor:
    """gates * (step * (values W_e^T) + projected up_e^T + bias_e) for every slot's expert e; see `reference.experts`.

    Returns [tokens, top_k, out]; the sum over top_k is the caller's. x: one row per token, or one per slot. x.projected:
    [slots, rank], as of `project_experts`. weight: of all experts (`stack_weights`). up: [experts, out, rank], bias:
    [experts, out], gates: [tokens, top_k] of any float dtype. routing: of `align_tokens` with the block of `block_of`. The
    rest, ValueErrors too, as in `weight_gemm`.
    """
    tokens, top_k = routing.expert_of.shape
    slots, device = tokens * top_k, x.values.device
    check(x, weight, up, bias, slots)
    if weight.experts != routing.experts:
        raise ValueError(f"weight: of {weight.experts} experts: expected {routing.experts}, those of the routing")
    if x.tokens not in (tokens, slots):
        raise ValueError(f"values: {x.tokens} rows: expected one for each of {tokens} tokens or {slots} slots")
    if gates is not None and (gates.shape != routing.expert_of.shape or not gates.is_contiguous()):
        raise ValueError(f"gates: {list(gates.shape)}: expected {[tokens, top_k]}, contiguous")
    # A block of slots tells the tile: no decoding tile has as many rows as one of prefill.
    tilings = [tiling_of(routing.block, weight, dtype=x.dtype, device=device, decoding=one) for one in (True, False)]
    tiling = next((one for one in tilings if one.bm == routing.block), None)
    if tiling is None:
        raise ValueError(f"routing: block {routing.block}: expected one of {[one.bm for one in tilings]}, see block_of")
    out = torch.empty(tokens, top_k, weight.out_features, dtype=out_dtype or x.dtype, device=device)
    if slots == 0:
        return out
    multiply_into(
        out,
        x,
        weight,
        up,
        bias,
        tiling,
        row_blocks=routing.expert_of_block.shape[0],
        splits=splits,
        gates=gates,
        slots=routing.slots,
        expert_of_block=routing.expert_of_block,
    )
    return out


def project_experts(x: Tensor, down: Tensor, routing: Routing, *, steps: Tensor | None = None) -> Tensor:
    """down_e @ x for every slot's expert e: [slots, rank] float32, what `expert_gemm` multiplies by its up.

    x: [tokens or slots, in], unquantized. down: [experts, rank, in] of any float dtype, or int8 codes. steps: [experts, rank]
    float32, of both factors' codes multiplied. routing: of any block of `align_tokens`. Raises ValueError for other shapes.
    """
    tokens, top_k = routing.expert_of.shape
    slots, device = tokens * top_k, x.device
    if x.shape[0] not in (tokens, slots) or not x.is_contiguous():
        raise ValueError(
            f"x: {list(x.shape)}: expected one row for each of {tokens} tokens or {slots} slots, contiguous"
        )
    if down.ndim != 3 or (down.shape[0], down.shape[2]) != (routing.experts, x.shape[1]) or not down.is_contiguous():
        expected = f"[{routing.experts}, rank, {x.shape[1]}]"
        raise ValueError(f"down: {list(down.shape)}: expected {expected}, contiguous")
    rank = down.shape[1]
    out = torch.empty(slots, rank, dtype=torch.float32, device=device)
    if slots == 0:
        return out
    tiling = projection_tiling(routing.block)
    grid = (-(-rank // tiling.bn), routing.expert_of_block.shape[0])
    splits = splits_of(grid[0] * grid[1], -(-x.shape[1] // tiling.bk))
    with launch.current(device), summed_over(splits, out) as target:
        project_kernel[grid[0], splits, grid[1]](
            x=x,
            down=down,
            out=target,
            slots=routing.slots,
            expert_of_block=routing.expert_of_block,
            count=slots,
            experts=routing.experts,
            rank=rank,
            in_features=x.shape[1],
            SPLITS=splits,
            SHARING=1 if x.shape[0] == slots else top_k,
            BM=tiling.bm,
            BN=tiling.bn,
            BR=tiling.bk,
            WAIT=launch.waits(launch.major_of(x.device)),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **{name: value for name, value in launch.arithmetic(x.dtype).items() if name != "ASM"},
        )
    return out if steps is None else out * steps[routing.expert_of.reshape(-1)]


@triton.jit
def project_kernel(
    x,
    down,
    out,
    slots,
    expert_of_block,
    count,
    experts,
    rank,
    in_features,
    SPLITS: tl.constexpr,
    SHARING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One tile of out [SPLITS, slots, rank]; grid (ceil(rank / BN), SPLITS, blocks of slots): `finish_tile` of nothing, with
    down as the factor and x as what it multiplies."""
    block = tl.program_id(2)
    slot = tl.load(slots + block * BM + tl.arange(0, BM))
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert >= experts:
        return
    rows = tl.minimum(slot, count - 1).to(tl.int64)
    split = tl.program_id(1)
    finish_tile(
        tl.zeros((BN, BM), tl.float32),
        None,
        down + expert * rank * in_features,
        x,
        None,
        None,
        out + split.to(tl.int64) * count * rank,
        tl.program_id(0) * BN + tl.arange(0, BN),
        rows,
        rows // SHARING,
        rows,
        slot < count,
        rank,
        in_features,
        split,
        SPLITS,
        BR,
        COMPUTE,
        PRECISION,
        WAIT,
    )
