"""y = x W^T with an integer weight, low-rank term and bias in the same kernel: for a few tokens at a time, or for many.

Few tokens (decoding) are bound by instructions for every weight as much as by memory. There the dot is of the codes less their
zero points, exact integers, and scales multiply its result. With many tokens (prefill) a dequantized weight serves them all.
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
from counterweight.kernels.gpu.layout import DECODE_TOKENS, PackedWeight, PreparedInput
from counterweight.kernels.gpu.partials import summed_over
from counterweight.kernels.gpu.weight_tile import decode_tile, dense_tile, finish_tile

__all__ = ["Tiling", "decode_tiling", "dense_tiling", "splits_of", "weight_gemm", "weight_kernel", "whole_splits"]

_PROGRAMS = 264  # to have at once: two on each of the 132 multiprocessors of an H100 or H200
_LEAST_BLOCKS = 4  # blocks a split has at least: as many as its loads are ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Tokens (bm), output features (bn), columns (bk) and directions of the low-rank term (br) of a tile, and how one program
    computes it. decoding: by the kernel for a few tokens, whose columns are the weight's blocks."""

    decoding: bool = False
    bm: int
    bn: int = 128
    bk: int = 64
    br: int = 32
    warps: int
    stages: int


def decode_tiling(tokens: int, bits: int, dtype: torch.dtype, major: int) -> Tiling:
    """Tile of the decoding kernel; major: the device's compute capability.

    Four warps keep their part of 128 weight rows and 16 tokens in 150 to 170 registers: three programs on a multiprocessor.
    With 32 tokens, codes of 3 bits and what Blackwell needs for its tensor memory do not fit beside the sums; eight warps share
    them. float32 is multiplied without tensor cores, each thread holding what it needs of both operands.
    """
    bm = 8 if tokens <= 8 else 16 if tokens <= 16 else 32
    if dtype == torch.float32:
        return Tiling(decoding=True, bm=min(bm, 16), bn=64, warps=8, stages=2)
    return Tiling(decoding=True, bm=bm, warps=8 if bm == 32 and (bits == 3 or major >= 10) else 4, stages=4)


def dense_tiling(tokens: int, dtype: torch.dtype, block: int, major: int) -> Tiling:
    """Tile of the prefill kernel: as many tokens as a dequantized weight can serve, for instructions of dequantization to stay
    below the tensor cores' time. What Blackwell stores at scattered rows fills its registers with more than 64 numbers a
    thread; without its and Hopper's asynchronous products, 64 tokens do."""
    bk = min(64, block)
    if dtype == torch.float32:
        return Tiling(bm=32, bk=32, warps=4, stages=2)
    if major not in (9, 10):
        return Tiling(bm=64, bk=bk, br=16, warps=4, stages=3)
    if tokens <= 64:
        return Tiling(bm=64, bk=bk, warps=4, stages=3)
    if tokens <= 128 or major == 10:
        return Tiling(bm=128, bk=bk, warps=8 if major == 10 else 4, stages=3)
    return Tiling(bm=256, bk=bk, warps=8, stages=3)


def splits_of(tiles: int, blocks: int) -> int:
    """In how many parts to sum over `blocks` blocks of columns, so that `tiles` output tiles become enough programs."""
    share = max(1, min(_PROGRAMS // tiles, blocks // _LEAST_BLOCKS))
    return whole_splits(share, blocks)


def whole_splits(splits: int, blocks: int) -> int:
    """At most `splits`, such that none is empty when each but the last takes ceil(blocks / splits) blocks."""
    return -(-blocks // -(-blocks // splits))


def weight_gemm(
    x: PreparedInput,
    weight: PackedWeight,
    *,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    splits: int | None = None,
    decoding: bool | None = None,
) -> Tensor:
    """step * (values W^T) + projected up^T + bias, [tokens, out] in `out_dtype` (by default x's); see `reference.linear`.

    up: [out, rank] of any float dtype, or int8 codes whose steps are in x.projected; needed exactly when x.projected is there.
    bias: [out]. splits: parts in which columns are summed, None for as many as fill a GPU. decoding: which of the two kernels
    multiplies, None for the one that suits the number of tokens.

    Sums are float32, in an order that depends on shapes alone. With integer codes as values, the decoding kernel's are exact as
    long as they stay below 2**24 in every group. Raises ValueError for shapes, dtypes or devices that do not go together.
    """
    check(x, weight, up, bias, x.tokens)
    if weight.experts is not None:
        raise ValueError(f"weight: of {weight.experts} experts: expected a single one")
    tokens, device = x.tokens, x.values.device
    out = torch.empty(tokens, weight.out_features, dtype=out_dtype or x.dtype, device=device)
    if tokens == 0:
        return out
    tiling = tiling_of(tokens, weight, dtype=x.dtype, device=device, decoding=decoding)
    multiply_into(out, x, weight, up, bias, tiling, row_blocks=-(-tokens // tiling.bm), splits=splits)
    return out


def multiply_into(
    out: Tensor,
    x: PreparedInput,
    weight: PackedWeight,
    up: Tensor | None,
    bias: Tensor | None,
    tiling: Tiling,
    *,
    row_blocks: int,
    splits: int | None,
    gates: Tensor | None = None,
    slots: Tensor | None = None,
    expert_of_block: Tensor | None = None,
) -> None:
    """Launches `weight_kernel` for all of out [.., out_features], whose rows are cut into `row_blocks`; arguments that were
    checked. slots, expert_of_block: of `experts.Routing`, None for a weight without experts."""
    count = out.numel() // weight.out_features
    feature_blocks, blocks = weight.rows // tiling.bn, weight.columns // weight.block
    splits = splits_of(feature_blocks * row_blocks, blocks) if splits is None else whole_splits(splits, blocks)
    with launch.current(out.device), summed_over(splits, out) as target:
        weight_kernel[feature_blocks, splits, row_blocks](
            values=x.values,
            step=x.step,
            low=weight.planes[0],
            high=weight.planes[1] if len(weight.planes) > 1 else None,
            scale=weight.scale,
            offset=weight.offset,
            up=up,
            projected=x.projected,
            bias=bias,
            gates=gates,
            out=target,
            slots=slots,
            expert_of_block=expert_of_block,
            count=count,
            experts=weight.experts,
            rows=weight.rows,
            blocks=blocks,
            in_features=weight.in_features,
            out_features=weight.out_features,
            rank=0 if up is None else up.shape[-1],
            BITS=weight.bits,
            GROUPED=weight.groups > 1,
            BLOCK=weight.block,
            SPLITS=splits,
            SHARING=count // x.tokens,
            DECODING=tiling.decoding,
            WHOLE=weight.in_features == weight.columns,
            BM=tiling.bm,
            BN=tiling.bn,
            BK=tiling.bk,
            BR=tiling.br,
            WAIT=launch.waits(launch.major_of(out.device)),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **launch.arithmetic(x.dtype),
        )


def check(x: PreparedInput, weight: PackedWeight, up: Tensor | None, bias: Tensor | None, outputs: int) -> None:
    """Raises ValueError unless a kernel can be given these. outputs: rows that it computes, those of x.projected."""
    device = x.values.device
    if not launch.runs_on(device):
        raise ValueError(f"values: on {device}: expected a device that kernels run on in this process")
    _expect("values", x.values, (x.tokens, weight.in_features), device)
    if (up is None) != (x.projected is None):
        raise ValueError("up, projected: one is None: expected both of a low-rank term, or none")
    experts = () if weight.experts is None else (weight.experts,)
    if up is not None and x.projected is not None:
        _expect("up", up, (*experts, weight.out_features, x.projected.shape[-1]), device)
        _expect("projected", x.projected, (outputs, x.projected.shape[-1]), device)
    if bias is not None:
        _expect("bias", bias, (*experts, weight.out_features), device)
    if x.step is not None:
        _expect("step", x.step, (x.tokens,), device)
    _expect("scale", weight.scale, tuple(weight.scale.shape), device)


def tiling_of(
    rows: int, weight: PackedWeight, *, dtype: torch.dtype, device: torch.device, decoding: bool | None = None
) -> Tiling:
    """The tile for so many rows that one weight multiplies; under the interpreter, Hopper's. decoding: see `weight_gemm`."""
    major = launch.major_of(device)
    if rows <= DECODE_TOKENS if decoding is None else decoding:
        return decode_tiling(rows, weight.bits, dtype, major)
    return dense_tiling(rows, dtype, weight.block, major)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape or tensor.device != device or not tensor.is_contiguous():
        found = f"{list(tensor.shape)} on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{name}: {found}: expected {list(shape)} on {device}, contiguous")


@triton.jit
def weight_kernel(
    values,
    step,
    low,
    high,
    scale,
    offset,
    up,
    projected,
    bias,
    gates,
    out,
    slots,
    expert_of_block,
    count,
    experts,
    rows,
    blocks,
    in_features,
    out_features,
    rank,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARING: tl.constexpr,
    DECODING: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One tile of out [SPLITS, count, out_features]; grid (rows / BN, SPLITS, blocks of BM rows of out).

    slots: None, or for weights of several experts the rows of out in blocks of one expert each (`experts.Routing`).
    SHARING: rows of out that share a row of values.
    """
    block = tl.program_id(2)
    if slots is None:
        slot = block * BM + tl.arange(0, BM)
    else:
        slot = tl.load(slots + block * BM + tl.arange(0, BM))
        expert = tl.load(expert_of_block + block).to(tl.int64)
        if expert >= experts:
            return
        CODES: tl.constexpr = 1 if BITS == 8 else 8 if BITS == 4 else 16
        low += expert * rows * (blocks * (BLOCK // CODES))
        scale += expert * rows * (blocks if GROUPED else 1)
        if high is not None:
            high += expert * rows * (blocks * (BLOCK // CODES))
        if offset is not None:
            offset += expert * rows * (blocks if GROUPED else 1)
        if up is not None:
            up += expert * out_features * rank
        if bias is not None:
            bias += expert * out_features
    y_rows = tl.minimum(slot, count - 1).to(tl.int64)
    x_rows = y_rows // SHARING
    first_row = tl.program_id(0) * BN
    split = tl.program_id(1)
    share = tl.cdiv(blocks, SPLITS)
    first = split * share
    last = tl.minimum(first + share, blocks)
    if DECODING:
        acc = decode_tile(
            values,
            low,
            high,
            scale,
            offset,
            x_rows,
            first_row,
            rows,
            blocks,
            in_features,
            first,
            last,
            BITS,
            GROUPED,
            BLOCK,
            BM,
            BN,
            WHOLE,
            COMPUTE,
            PRECISION,
            ASM,
            WAIT,
        )
    else:
        acc = dense_tile(
            values,
            low,
            high,
            scale,
            offset,
            x_rows,
            first_row,
            rows,
            blocks,
            in_features,
            first,
            last,
            BITS,
            GROUPED,
            BLOCK,
            BM,
            BN,
            BK,
            WHOLE,
            COMPUTE,
            PRECISION,
            ASM,
            WAIT,
        )
    finish_tile(
        acc,
        step,
        up,
        projected,
        bias,
        gates,
        out + split.to(tl.int64) * count * out_features,
        first_row + tl.arange(0, BN),
        x_rows,
        y_rows,
        y_rows,
        slot < count,
        out_features,
        rank,
        split,
        SPLITS,
        BR,
        COMPUTE,
        PRECISION,
        WAIT,
    )
