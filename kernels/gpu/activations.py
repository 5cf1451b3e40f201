"""One pass over a layer's input: norm, smoothing, quantization, sums of codes, and the low-rank branch's first half.

A token's step needs its largest magnitude, and that its norm, so a program first sweeps whole tokens, twice at most, and then
writes its share of columns; what it rereads is in its cache. Programs that share tokens repeat the sweeps: cheaper than
to wait for each other. Quantization is `kernels.reference.quantize_activations`, to the bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
# Bodies of Triton kernels have no Python types; the functions that launch them do.

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.hadamard import transform
from counterweight.kernels.gpu.integer_gemm import IntegerWeight
from counterweight.kernels.gpu.layout import PackedWeight, PreparedInput
from counterweight.kernels.gpu.partials import summed_over
from counterweight.kernels.hadamard import Hadamard

__all__ = ["prepare", "unsupported"]

_PROGRAMS = 128
"""Programs that a launch is cut into if it can be: about one for each multiprocessor of the large GPUs."""
_STAGES = 3  # tiles in flight; a fourth has no place in the shared memory of an sm_89
_REGISTERS = 255
"""A thread's limit. Without one, ptxas spills a value or two of the larger tiles to fit another program in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How a launch is cut: tokens and columns of a tile, columns that are swept at a time, ranks, columns of a program."""

    block_m: int
    block_k: int
    sweep: int
    block_r: int
    slice: int
    rank_programs: int
    warps: int


def unsupported(activations: ActivationFormat | None) -> str | None:
    """Why inputs cannot be quantized like this here; None when they can."""
    if activations is None:
        return None
    if activations.group_size is not None:
        return f"activations.group_size: {activations.group_size}: expected None, one scale per token"
    if not 2 <= activations.bits <= 8:
        return f"activations.bits: {activations.bits}: expected 2 to 8"
    return None


def prepare(
    x: Tensor,
    weight: PackedWeight | IntegerWeight,
    *,
    activations: ActivationFormat | None = None,
    down: Tensor | None = None,
    step: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    smooth: Tensor | None = None,
    hadamard: Hadamard | None = None,
) -> PreparedInput:
    """The input x [tokens, in] as the kernel of this kind of weight reads it; float16, bfloat16 or float32, contiguous.

    In this order: norm, an RMSNorm's weight [in] and epsilon, as transformers computes it; smooth [in], which multiplies; the
    transform, by a kernel of its own. What results is projected by down [rank, in], floats, or int8 codes with the step
    [rank] float32 of both factors; and it is quantized, with the very codes of `quantize_activations`. norm and smooth have
    x's dtype. A token that is not finite gets NaN for a step, and so for a result.

    For a `PackedWeight`, values have x's dtype; for an `IntegerWeight` they are int8, with sums if it has zero points. Raises
    ValueError for what is `unsupported` and for shapes, dtypes and layouts other than these.
    """
    if reason := unsupported(activations):
        raise ValueError(reason)
    integer = isinstance(weight, IntegerWeight)
    if integer and activations is None:
        raise ValueError("activations: none: expected a format, the integer kernel multiplies codes")
    _check(x, weight.in_features, down, step, norm, smooth)
    if hadamard is not None:
        if norm is not None or smooth is not None:
            x = _launch(x, norm=norm, smooth=smooth).values
        x, norm, smooth = transform(x, hadamard), None, None
    summed = weight.block if isinstance(weight, IntegerWeight) and weight.zero_point is not None else 0
    return _launch(
        x, integer=integer, summed=summed, activations=activations, down=down, step=step, norm=norm, smooth=smooth
    )


def _launch(
    x: Tensor,
    *,
    integer: bool = False,
    summed: int = 0,
    activations: ActivationFormat | None = None,
    down: Tensor | None = None,
    step: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    smooth: Tensor | None = None,
) -> PreparedInput:
    """integer: write int8 codes, not x's dtype. summed: columns over which codes are summed, 0 for no sums."""
    tokens, in_features = x.shape
    rank = 0 if down is None else int(down.shape[0])
    plan = _plan(max(tokens, 1), in_features, rank)
    slices = triton.cdiv(in_features, plan.slice)
    # Where nothing happens to x it is not copied either.
    emitted = activations is not None or norm is not None or smooth is not None
    empty = partial(torch.empty, device=x.device)
    values = empty(tokens, in_features, dtype=torch.int8 if integer else x.dtype) if emitted else x
    codes_step = None if activations is None else empty(tokens, dtype=torch.float32)
    sums = empty(tokens, triton.cdiv(in_features, summed), dtype=torch.float32) if summed else None
    projected = empty(tokens, rank, dtype=torch.float32) if rank else None
    partial_sums = nullcontext() if projected is None else summed_over(slices, projected)
    with launch.current(x.device), partial_sums as partials:
        if tokens and (emitted or rank):
            _prepare[(triton.cdiv(tokens, plan.block_m), slices, plan.rank_programs)](
                x,
                None if norm is None else norm[0],
                smooth,
                down,
                step,
                values,
                codes_step,
                sums,
                partials,
                tokens,
                in_features,
                rank,
                plan.slice,
                0.0 if norm is None else norm[1],
                1.0 if activations is None else activations.clip,
                NORM=norm is not None,
                SMOOTH=smooth is not None,
                BITS=0 if activations is None else activations.bits,
                CLIPPED=activations is not None and activations.clip != 1.0,
                SMALLEST_STEP=torch.finfo(x.dtype).eps,
                EMIT=emitted,
                SUMMED=summed,
                BRANCH=rank > 0,
                STEPPED=step is not None,
                BLOCK_M=plan.block_m,
                BLOCK_K=plan.block_k,
                SWEEP=plan.sweep,
                BLOCK_R=plan.block_r,
                COMPUTE=launch.arithmetic(x.dtype)["COMPUTE"],
                PRECISION=launch.arithmetic(x.dtype)["PRECISION"],
                num_warps=plan.warps,
                num_stages=_STAGES,
                maxnreg=_REGISTERS if plan.block_m > 1 else None,
            )
    return PreparedInput(values=values, step=codes_step, sums=sums, projected=projected)


def _plan(tokens: int, columns: int, rank: int) -> _Plan:
    """Tiles by the number of tokens. Without a branch a token is one program's: little to read, nothing to add up.

    With one, the factor is the bulk of what is read for few tokens, and is spread over all multiprocessors: by ranks and by
    columns. One token is multiplied without tensor cores, whose smallest tile would repeat it 16 times. Beyond 64 tokens
    programs sweep over all ranks, because each would otherwise repeat what precedes the projection.
    """
    if not rank:
        sweep = min(4096, max(256, triton.next_power_of_2(columns)))
        return _Plan(block_m=1, block_k=sweep, sweep=sweep, block_r=16, slice=columns, rank_programs=1, warps=4)
    if tokens == 1:
        block_m, block_k, sweep, block_r, warps = 1, 128, 4096, 32, 4
    elif tokens <= 64:
        block_m, block_k, sweep, block_r, warps = 16, 128, 256, 64, 4
    else:
        block_m, block_k, sweep, block_r, warps = 64, 128, 128, 64, 8
    rank_programs = triton.cdiv(rank, block_r) if tokens <= 64 else 1
    slices = max(1, _PROGRAMS // (triton.cdiv(tokens, block_m) * rank_programs))
    return _Plan(
        block_m=block_m,
        block_k=block_k,
        sweep=sweep,
        block_r=block_r,
        slice=triton.cdiv(triton.cdiv(columns, slices), block_k) * block_k,
        rank_programs=rank_programs,
        warps=warps,
    )


def _check(
    x: Tensor,
    in_features: int,
    down: Tensor | None,
    step: Tensor | None,
    norm: tuple[Tensor, float] | None,
    smooth: Tensor | None,
) -> None:
    if x.ndim != 2 or x.shape[1] != in_features or not x.is_contiguous():
        raise ValueError(f"x: {list(x.shape)}, strides {x.stride()}: expected [tokens, {in_features}], contiguous")
    launch.arithmetic(x.dtype)
    for name, vector in (("norm", None if norm is None else norm[0]), ("smooth", smooth)):
        if vector is not None and (tuple(vector.shape) != (in_features,) or vector.dtype is not x.dtype):
            raise ValueError(f"{name}: {vector.dtype} {list(vector.shape)}: expected {x.dtype} [{in_features}]")
    if down is not None and (down.ndim != 2 or down.shape[1] != in_features or not down.is_contiguous()):
        raise ValueError(
            f"down: {list(down.shape)}, strides {down.stride()}: expected [rank, {in_features}], contiguous"
        )
    ranks = None if down is None else (int(down.shape[0]),)
    if step is not None and (tuple(step.shape) != ranks or step.dtype is not torch.float32):
        raise ValueError(f"step: {step.dtype} {list(step.shape)}: expected float32 [rank], with down")


@triton.jit
def _rounded(values, like):
    """float32 values as the dtype of pointer `like` knows them."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _inputs(x, norm, smooth, rows, column, in_features, inverse, NORM: tl.constexpr, SMOOTH: tl.constexpr):
    """A tile of what is quantized and projected, float32, rounded as often as torch rounds it; zero beyond in_features."""
    inside = column < in_features
    values = tl.load(x + rows[:, None] * in_features + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        values = _rounded(weight[None, :] * _rounded(values * inverse[:, None], x), x)
    if SMOOTH:
        factor = tl.load(smooth + column, mask=inside, other=0.0).to(tl.float32)
        values = _rounded(values * factor[None, :], x)
    return values


@triton.jit
def _codes(part, scale, x, BITS: tl.constexpr):
    """Values of a tile over their token's scale, rounded to x's dtype and then to integers, half to even."""
    part = _rounded(tl.div_rn(part, tl.broadcast_to(scale[:, None], part.shape)), x)
    part = (part + 12582912.0) - 12582912.0  # near 1.5 * 2**23 a float32 has no bits for fractions
    return tl.minimum(tl.maximum(part, -(1 << (BITS - 1))), (1 << (BITS - 1)) - 1)


@triton.jit
def _write(part, values, sums, rows, valid, first, columns, SUMMED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Stores a tile [tokens, BLOCK_K] that begins at column `first`, and its sums."""
    BLOCK_M: tl.constexpr = part.shape[0]
    if SUMMED:
        COUNT: tl.constexpr = BLOCK_K // SUMMED
        block, blocks = first // SUMMED + tl.arange(0, COUNT), tl.cdiv(columns, SUMMED)
        total = tl.sum(tl.reshape(part, (BLOCK_M, COUNT, SUMMED)), 2)
        mask = valid[:, None] & (block < blocks)[None, :]
        tl.store(sums + rows[:, None] * blocks + block[None, :], total, mask=mask)
    column = first + tl.arange(0, BLOCK_K)
    to = values + rows[:, None] * columns + column[None, :]
    tl.store(to, part.to(values.dtype.element_ty), mask=valid[:, None] & (column < columns)[None, :])


@triton.jit
def _prepare(
    x,
    norm,
    smooth,
    down,
    step,
    values,
    codes_step,
    sums,
    projected,
    tokens,
    in_features,
    rank,
    slice,
    epsilon,
    clip,
    NORM: tl.constexpr,
    SMOOTH: tl.constexpr,
    BITS: tl.constexpr,
    CLIPPED: tl.constexpr,
    SMALLEST_STEP: tl.constexpr,
    EMIT: tl.constexpr,
    SUMMED: tl.constexpr,
    BRANCH: tl.constexpr,
    STEPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWEEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles of tokens, slices of columns, shares of the ranks. projected: [slices, tokens, rank], partial sums."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(token, tokens - 1).to(tl.int64)
    valid = token < tokens
    begin = tl.program_id(1) * slice
    end = tl.minimum(begin + slice, in_features)

    inverse = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORM:
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, in_features, SWEEP):
            column = first + tl.arange(0, SWEEP)
            part = _inputs(x, norm, smooth, rows, column, in_features, inverse, False, False)
            squares += tl.sum(part * part, 1)
        inverse = tl.div_rn(inverse, tl.sqrt_rn(squares / in_features + epsilon))
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if BITS:
        largest = tl.zeros((BLOCK_M,), tl.float32)
        poison = tl.zeros((BLOCK_M,), tl.float32)  # NaN once an infinity or a NaN was seen: maxima pass over those
        for first in range(0, in_features, SWEEP):
            column = first + tl.arange(0, SWEEP)
            part = _inputs(x, norm, smooth, rows, column, in_features, inverse, NORM, SMOOTH)
            largest = tl.maximum(largest, tl.max(tl.abs(part), 1))
            poison += tl.sum(part * 0.0, 1)
        scale = _rounded(tl.div_rn(largest, tl.full((BLOCK_M,), ((1 << BITS) - 1) / 2, tl.float32)), x)
        if CLIPPED:
            scale = _rounded(scale * clip, x)
        scale = tl.where(scale == 0.0, SMALLEST_STEP, scale)
        if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            tl.store(codes_step + rows, scale + poison, mask=valid)

    if EMIT:  # noqa: SIM102 - decided when this is compiled, the other when it runs
        if tl.program_id(2) == 0:
            for first in range(begin, end, BLOCK_K):
                column = first + tl.arange(0, BLOCK_K)
                part = _inputs(x, norm, smooth, rows, column, in_features, inverse, NORM, SMOOTH)
                if BITS:
                    part = _codes(part, scale, x, BITS)
                _write(part, values, sums, rows, valid, first, in_features, SUMMED, BLOCK_K)

    if BRANCH:
        for first_rank in range(tl.program_id(2) * BLOCK_R, rank, tl.num_programs(2) * BLOCK_R):
            at = first_rank + tl.arange(0, BLOCK_R)
            product = tl.zeros((BLOCK_R, BLOCK_K if BLOCK_M == 1 else BLOCK_M), tl.float32)
            for first in range(begin, end, BLOCK_K):
                column = first + tl.arange(0, BLOCK_K)
                part = _inputs(x, norm, smooth, rows, column, in_features, inverse, NORM, SMOOTH)
                mask = (at < rank)[:, None] & (column < in_features)[None, :]
                factor = tl.load(down + at[:, None].to(tl.int64) * in_features + column[None, :], mask=mask, other=0)
                if BLOCK_M == 1:
                    product += factor.to(tl.float32) * part
                else:
                    factor = factor.to(COMPUTE)
                    product = tl.dot(factor, tl.trans(part.to(COMPUTE)), product, input_precision=PRECISION)
            total = tl.sum(product, 1)[:, None] if BLOCK_M == 1 else product
            if STEPPED:
                total *= tl.load(step + at, mask=at < rank, other=0.0)[:, None]
            to = (tl.program_id(1).to(tl.int64) * tokens + rows)[None, :] * rank + at[:, None]
            tl.store(projected + to, total, mask=(at < rank)[:, None] & valid[None, :])
