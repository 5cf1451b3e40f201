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


@triton.jit
def decode_tile(
    values,
    sums,
    low,
    high,
    scale,
    offset,
    x_rows,
    first_row,
    rows,
    blocks,
    first_block,
    last_block,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
):
    """Weight rows first_row.. times permuted `values`, over blocks first_block .. last_block - 1 of BLOCK columns.

    The dot is of MAGIC + u; what MAGIC and offset add to it is subtracted after each block, where numbers are small enough for
    sums of integer codes to stay exact, and scales multiply last. Scales, offsets and sums are read a block ahead by hand:
    the compiler overlaps only the dot's own operands, and waits for all others on the spot.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    # bfloat16's mantissa does not hold an 8-bit code, nor is there a pair to unpack: such codes are converted.
    MAGIC: tl.constexpr = 0 if BITS == 8 else 1024 if dtype == tl.float16 else 128 if dtype == tl.bfloat16 else 0
    HALF: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    CORRECTED: tl.constexpr = (offset is not None) or MAGIC + HALF != 0
    w_rows = first_row + tl.arange(0, BN)
    ks = tl.arange(0, BLOCK)
    x_at = values + x_rows[None, :] * (blocks * BLOCK) + ks[:, None]
    s_at = sums + x_rows * blocks
    step = rows if GROUPED else 0
    scale += first_block * step + w_rows
    factor = tl.load(scale).to(tl.float32)
    if offset is not None:
        offset += first_block * step + w_rows
        shift = MAGIC + tl.load(offset)
    if CORRECTED:
        total = tl.load(s_at + first_block)
    acc = tl.zeros((BN, BM), tl.float32)
    for block in tl.range(first_block, last_block):
        following = tl.minimum(block + 1, last_block - 1)
        if CORRECTED:
            next_total = tl.load(s_at + following)
        if GROUPED:
            next_factor = tl.load(scale + (following - first_block) * rows).to(tl.float32)
            if offset is not None:
                next_shift = MAGIC + tl.load(offset + (following - first_block) * rows)
        codes = _mantissas(low, high, w_rows, blocks, block, BITS, BLOCK, BN, dtype, ASM).to(COMPUTE)
        x = tl.load(x_at + block * BLOCK).to(COMPUTE)
        if GROUPED:
            part = tl.dot(codes, x, input_precision=PRECISION)
            if offset is not None:
                part -= shift[:, None] * total[None, :]
                shift = next_shift
            elif CORRECTED:
                part -= (MAGIC + HALF) * total[None, :]
            acc += part * factor[:, None]
            factor = next_factor
        else:
            acc = tl.dot(codes, x, acc, input_precision=PRECISION)
            if offset is not None:
                acc -= shift[:, None] * total[None, :]
            elif CORRECTED:
                acc -= (MAGIC + HALF) * total[None, :]
        if CORRECTED:
            total = next_total
    if not GROUPED:
        acc *= factor[:, None]
    return acc


@triton.jit
def _mantissas(
    low,
    high,
    w_rows,
    blocks,
    block,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    dtype: tl.constexpr,
    ASM: tl.constexpr,
):
    """Codes of one block [BN, BLOCK] as MAGIC + u of dtype (u for float32), columns in the order of `permute_columns`; 8 bits:
    int8 codes."""
    if BITS == 8:
        return tl.load(
            low + w_rows.to(tl.int64)[:, None] * (blocks * BLOCK) + (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        )
    else:
        WIDTH: tl.constexpr = 4 if BITS == 4 else 2
        PAIRS: tl.constexpr = 16 // WIDTH
        WORDS: tl.constexpr = BLOCK // (2 * PAIRS)
        word = w_rows.to(tl.int64)[:, None] * (blocks * WORDS) + (block * WORDS + tl.arange(0, WORDS))[None, :]
        pair = tl.arange(0, PAIRS)[None, None, :]
        numbers = _magic(tl.load(low + word)[:, :, None] >> (pair * WIDTH), WIDTH, dtype, ASM)
        if BITS == 3:
            # The two bytes of top bits to the two halves, two bits up; then bit `pair` of each half is shifted to bit 2.
            top = tl.load(high + word).to(tl.int32)
            top = ((top & 0xFF) | ((top & 0xFF00) << 8)) << 2
            numbers = numbers | ((top[:, :, None] >> pair) & 0x00040004)
        if dtype == tl.float32:
            even = (numbers & 0xFFFF).to(dtype)
            odd = (numbers >> 16).to(dtype)
        else:
            even = numbers.to(tl.int16).to(dtype, bitcast=True)
            odd = (numbers >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.reshape(tl.join(even, odd), (BN, BLOCK))


@triton.jit
def _magic(fields, WIDTH: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Two numbers MAGIC + u of dtype in an int32 (u for float32), from one with u at the bottom of both halves."""
    MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x10001
    BIASES: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400 if dtype == tl.float16 else 0
    if ASM:
        # (fields & MASK) | BIASES in one instruction, for which triton 3.6 spends two.
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {MASK}, {BIASES}, 0xea;", "=r,r", [fields], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (fields & MASK) | BIASES


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
):
    """Weight rows first_row.. times `values` in natural order, over blocks first_block .. last_block - 1 of BLOCK columns, BK
    of them at a time.

    Weights are dequantized in float32 and rounded to the type of the dot. WHOLE: in_features is blocks * BLOCK.
    """
    w_rows = first_row + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    x_at = values + x_rows[None, :] * in_features + ks[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first_block * (BLOCK // BK), last_block * (BLOCK // BK)):
        k = step * BK
        group = k // BLOCK * rows + w_rows if GROUPED else w_rows
        weight = _centred(low, high, offset, group, w_rows, blocks, step, BITS, BLOCK, BN, BK)
        weight = weight * tl.load(scale + group).to(tl.float32)[:, None]
        x = tl.load(x_at + k) if WHOLE else tl.load(x_at + k, mask=(k + ks < in_features)[:, None], other=0.0)
        acc = tl.dot(weight.to(COMPUTE), x.to(COMPUTE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _centred(
    low,
    high,
    offset,
    group,
    w_rows,
    blocks,
    step,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Codes minus their zero points [BN, BK] float32, in natural order, of columns step * BK.."""
    row = w_rows.to(tl.int64)[:, None]
    if BITS == 8:
        at = row * (blocks * BLOCK) + (step * BK + tl.arange(0, BK))[None, :]
        numbers = tl.load(low + at).to(tl.float32)
        if offset is not None:
            numbers -= tl.load(offset + group)[:, None]
        return numbers
    else:
        WIDTH: tl.constexpr = 4 if BITS == 4 else 2
        CODES: tl.constexpr = 32 // WIDTH
        WORDS: tl.constexpr = BK // CODES
        at = row * (blocks * (BLOCK // CODES)) + (step * WORDS + tl.arange(0, WORDS))[None, :]
        place = tl.arange(0, CODES // 2)[None, None, :] * 2
        even = tl.load(low + at)[:, :, None] >> (place * WIDTH)
        odd = even >> WIDTH
        even = even & ((1 << WIDTH) - 1)
        odd = odd & ((1 << WIDTH) - 1)
        if BITS == 3:
            top = tl.load(high + at).to(tl.int32)[:, :, None] >> place
            even = even | ((top << 2) & 4)
            odd = odd | ((top << 1) & 4)
        # In the mantissa of 2**23 a small integer is a float already: cheaper than a conversion.
        even = (even | 0x4B000000).to(tl.float32, bitcast=True)
        odd = (odd | 0x4B000000).to(tl.float32, bitcast=True)
        numbers = tl.reshape(tl.join(even, odd), (BN, BK))
        if offset is not None:
            return numbers - (8388608.0 + tl.load(offset + group)[:, None])
        else:
            return numbers - (8388608.0 + (1 << (BITS - 1)))


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
            p = tl.load(p_at + r[:, None], mask=(r < rank)[:, None], other=0.0)
            acc = tl.dot(u.to(COMPUTE), p.to(COMPUTE), acc, input_precision=PRECISION)
    if bias is not None:
        added = tl.load(bias + w_rows, mask=inside, other=0.0).to(tl.float32)
        acc += tl.where(split == 0, added, 0.0)[:, None]
    if gate is not None:
        acc *= tl.load(gate + y_rows).to(tl.float32)[None, :]
    at = out + y_rows[None, :] * out_features + w_rows[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & stored[None, :])
