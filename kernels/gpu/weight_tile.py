"""One tile of a product with an integer weight: the device functions that `weight_gemm` and `experts` share.

Tiles are transposed, [BN output features, BM tokens]: the weight is the left operand of the tensor cores, which is
dequantized in registers and never goes through shared memory, and few tokens need no padding to 64.

Weights are padded to whole tiles (see `layout`), so no load of them needs a mask. `x_rows` are the rows of the input that a
tile multiplies, int64 [BM]; places without a token hold any valid row, and are not stored. Pointers are those of one weight.
"""

# Bodies of jit functions hold values of the triton language; they carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from counterweight.kernels.gpu.settle import settled


@triton.jit
def decode_tile(
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
    first_block,
    last_block,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Weight rows first_row.. times `values`, over blocks first_block .. last_block - 1 of BLOCK columns.

    The dot is of codes less their zero points, small integers that are exact in every type; scales multiply its result, so sums
    of integer codes of x stay exact. Scales and offsets are read a block ahead by hand: the compiler overlaps only the dot's
    own operands, and waits for all others on the spot. WHOLE: in_features is blocks * BLOCK.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    LATE: tl.constexpr = WAIT and not GROUPED  # a group's product is scaled at once, and is over by then
    w_rows = first_row + tl.arange(0, BN)
    ks = tl.arange(0, BLOCK)
    x_at = values + x_rows[None, :] * in_features + ks[:, None]
    step = rows if GROUPED else 0
    scale += first_block * step + w_rows
    factor = tl.load(scale).to(tl.float32)
    zero = None
    if offset is not None:
        offset += first_block * step + w_rows
        zero = tl.load(offset)
    acc = tl.zeros((BN, BM), tl.float32)
    for block in tl.range(first_block, last_block):
        if GROUPED:
            following = (tl.minimum(block + 1, last_block - 1) - first_block) * rows
            next_factor = tl.load(scale + following).to(tl.float32)
            if offset is not None:
                next_zero = tl.load(offset + following)
        codes = _centred(low, high, zero, w_rows, blocks * BLOCK, block, BITS, BN, BLOCK, dtype, COMPUTE, ASM, LATE)
        k = block * BLOCK
        x = tl.load(x_at + k) if WHOLE else tl.load(x_at + k, mask=(k + ks < in_features)[:, None], other=0.0)
        if GROUPED:
            acc += tl.dot(codes, x.to(COMPUTE), input_precision=PRECISION) * factor[:, None]
            factor = next_factor
            if offset is not None:
                zero = next_zero
        else:
            acc = tl.dot(codes, x.to(COMPUTE), acc, input_precision=PRECISION)
    if not GROUPED:
        acc *= factor[:, None]
    return acc


@triton.jit
def dense_tile(
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
    first_block,
    last_block,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Weight rows first_row.. times `values`, over blocks first_block .. last_block - 1 of BLOCK columns, BK of them at a time.

    Weights are dequantized in float32 and rounded to the type of the dot. WHOLE: in_features is blocks * BLOCK.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    w_rows = first_row + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    x_at = values + x_rows[None, :] * in_features + ks[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first_block * (BLOCK // BK), last_block * (BLOCK // BK)):
        k = step * BK
        group = k // BLOCK * rows + w_rows if GROUPED else w_rows
        zero = None
        if offset is not None:
            zero = tl.load(offset + group)
        codes = _centred(low, high, zero, w_rows, blocks * BLOCK, step, BITS, BN, BK, dtype, COMPUTE, ASM, WAIT)
        weight = codes.to(tl.float32) * tl.load(scale + group).to(tl.float32)[:, None]
        x = tl.load(x_at + k) if WHOLE else tl.load(x_at + k, mask=(k + ks < in_features)[:, None], other=0.0)
        acc = tl.dot(weight.to(COMPUTE), x.to(COMPUTE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _centred(
    low,
    high,
    zero,
    w_rows,
    columns,
    step,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Codes less their zero points [BN, BK] of COMPUTE, of columns step * BK..; zero: their offsets [BN], None for 2**(BITS-1).

    columns: codes of a row in memory. Nothing is rounded: the integers are within -255 .. 255, which bfloat16 still holds.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    CODES: tl.constexpr = 1 if BITS == 8 else 8 if BITS == 4 else 16  # of a word
    WORDS: tl.constexpr = BK // CODES
    at = w_rows.to(tl.int64)[:, None] * (columns // CODES) + (step * WORDS + tl.arange(0, WORDS))[None, :]
    if BITS == 8:
        shift = tl.full((BN, 1), HALF, tl.float32) if zero is None else zero.to(tl.float32)[:, None]
        return _difference(settled(tl.load(low + at), WAIT).to(tl.int32), shift, COMPUTE)
    else:
        WIDTH: tl.constexpr = 32 // CODES
        pair = tl.arange(0, CODES // 2)[None, None, :]
        fields = tl.load(low + at)[:, :, None] >> (pair * WIDTH)
        top = None
        if BITS == 3:
            # The two bytes of top bits to the two halves, two bits up; then bit `pair` of each half is shifted to bit 2.
            top = tl.load(high + at).to(tl.int32)
            top = ((top & 0xFF) | ((top & 0xFF00) << 8)) << 2
            top = (top[:, :, None] >> pair) & 0x00040004
        if dtype == tl.float32:
            MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
            numbers = fields & MASK
            if BITS == 3:
                numbers |= top
            shift = tl.full((BN, 1, 1), HALF, tl.float32) if zero is None else zero.to(tl.float32)[:, None, None]
            even, odd = _difference(numbers & 0xFFFF, shift, COMPUTE), _difference(numbers >> 16, shift, COMPUTE)
        else:
            numbers = _mantissas(fields, WIDTH, dtype, ASM)
            if BITS == 3:
                numbers |= top
            # -(MAGIC + offset) in both halves: an offset is added where the mantissa counts ones.
            MINUS: tl.constexpr = -0x3CFF3D00 if dtype == tl.bfloat16 else -0x1BFF1C00
            if zero is None:
                shift = tl.full((BN, 1, 1), MINUS + HALF * 0x10001, tl.int32)
            else:
                shift = (zero.to(tl.int32) * 0x10001 + MINUS)[:, None, None]
            even, odd = _sums(numbers, settled(shift, WAIT), dtype, COMPUTE, ASM)
        return tl.reshape(tl.join(even, odd), (BN, BK))


@triton.jit
def _difference(u, zero, COMPUTE: tl.constexpr):
    """u - zero, u int32 below 2**23: in the mantissa of 2**23 it is a float32 already, which is cheaper than a conversion."""
    return ((u | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)).to(COMPUTE)


@triton.jit
def _mantissas(fields, WIDTH: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Two numbers MAGIC + u of dtype in an int32, from one with u at the bottom of both halves; MAGIC: 128 in bfloat16, 1024 in
    float16, where the mantissa counts ones."""
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    MAGIC: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    if ASM:
        # (fields & MASK) | MAGIC in one instruction, for which triton 3.6 spends two.
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASK}, {MAGIC}, 0xea;", "=r,r", [fields], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (fields & MASK) | MAGIC


@triton.jit
def _sums(a, b, dtype: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """a + b, each two numbers of dtype in an int32: the sums of the low and of the high halves, of COMPUTE."""
    if ASM:
        # Two sums in one instruction. bfloat16 has no addition before sm_90, but a product with 1 and an addition.
        ONE: tl.constexpr = "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }"
        ADD: tl.constexpr = ONE if dtype == tl.bfloat16 else "add.rn.f16x2 $0, $1, $2;"
        total = tl.inline_asm_elementwise(ADD, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
        low, high = _halves(total, dtype)
        return low.to(COMPUTE), high.to(COMPUTE)
    else:
        a_low, a_high = _halves(a, dtype)
        b_low, b_high = _halves(b, dtype)
        low = a_low.to(tl.float32) + b_low.to(tl.float32)
        high = a_high.to(tl.float32) + b_high.to(tl.float32)
        return low.to(COMPUTE), high.to(COMPUTE)


@triton.jit
def _halves(pair, dtype: tl.constexpr):
    """The low and the high half of int32 as numbers of dtype."""
    low = pair.to(tl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low, high


@triton.jit
def finish_tile(
    acc,
    step,
    up,
    projected,
    bias,
    gate,
    out,
    w_rows,
    x_rows,
    p_rows,
    y_rows,
    stored,
    out_features,
    rank,
    split,
    SPLITS: tl.constexpr,
    BR: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Stores gate * (step * acc + up @ projected + bias), or this split's share of it, for output features w_rows.

    x_rows, p_rows, y_rows: rows of step, of projected, of gate and out, int64 [BM]; `stored`: which of them are a token's.
    The low-rank term is one of the unquantized input, hence it knows no step. Its directions are dealt to the splits.
    """
    inside = w_rows < out_features
    if step is not None:
        acc *= tl.load(step + x_rows)[None, :]
    if up is not None:
        u_at = up + w_rows.to(tl.int64)[:, None] * rank
        p_at = projected + p_rows[None, :] * rank
        directions = tl.arange(0, BR)
        for first in tl.range(split * BR, rank, SPLITS * BR):
            r = first + directions
            u = tl.load(u_at + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0)
            u = settled(u, WAIT and u.dtype != COMPUTE)  # what need not be converted is read out of shared memory
            p = tl.load(p_at + r[:, None], mask=(r < rank)[:, None], other=0.0)
            acc = tl.dot(u.to(COMPUTE), p.to(COMPUTE), acc, input_precision=PRECISION)
    if bias is not None:
        added = tl.load(bias + w_rows, mask=inside, other=0.0).to(tl.float32)
        acc += tl.where(split == 0, added, 0.0)[:, None]
    if gate is not None:
        acc *= tl.load(gate + y_rows).to(tl.float32)[None, :]
    at = out + y_rows[None, :] * out_features + w_rows[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & stored[None, :])
