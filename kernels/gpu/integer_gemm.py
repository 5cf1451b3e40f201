"""Linear layers on integer tensor cores: int8 codes of the input times int4 or int8 codes of the weight, for many tokens.

    y[m, n] = step[m] * sum_g scale[n, g] * (sum_{k in g} x[m, k] q[n, k]  -  zero[n, g] * sum_{k in g} x[m, k])
            + (projected @ up^T)[m, n] + bias[n]

The inner sum is exact, in int32. For a decoding step the weight kernel is the faster one: it needs no tile of 64 tokens.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Bodies of Triton kernels have no Python types; the functions that launch them do.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.layout import PreparedInput
from counterweight.kernels.gpu.settle import settled
from counterweight.kernels.weights.uniform import UniformWeight

__all__ = ["IntegerWeight", "integer_gemm", "prepare_integer", "unsupported"]

_UNIT = 128
"""Columns that one turn of the loop multiplies at most: two dots of 64 with 4 bits, one with 8."""
_LARGEST_INPUT = 1 << 16
"""A code less its zero point is at most 16 * 15 (see `_halves`) or 255, one of x 128: 255 * 128 * 2**16 is just an int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """A quantized weight [out, in] for the integer kernel.

    codes: int8. With 8 bits [out, columns], as they are. With fewer [out, columns / 2], two codes a byte: each row is cut into
    units, and byte j of a unit holds its column j in the low four bits, column j + unit / 2 in the high ones, as two's
    complement. columns are `in` rounded up to whole units, with codes of zero. scale: [groups, out], the checkpoint's dtype.
    zero_point: [groups, out] int8 or None. group_size: columns that share a scale; in_features per channel.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def groups(self) -> int:
        return int(self.scale.shape[0])

    @property
    def block(self) -> int:
        """Columns over which an input's codes are summed for zero points: a group, at most 128."""
        return _UNIT if self.groups == 1 else min(self.group_size, _UNIT)

    @property
    def blocks(self) -> int:
        return -(-self.in_features // self.block)

    @property
    def unit(self) -> int:
        """Columns that one turn of the kernel's loop multiplies."""
        return _unit(self.bits, self.group_size, self.groups)


def unsupported(weight: UniformWeight) -> str | None:
    """Why the integer kernel cannot multiply this weight; None when it can."""
    columns, group = weight.codes.shape[1], weight.group_size
    if columns % 32:
        return f"in_features: {columns}: expected a multiple of 32"
    if columns > _LARGEST_INPUT:
        return f"in_features: {columns}: expected at most {_LARGEST_INPUT}, beyond which a sum may pass int32"
    if group is None or group == columns:
        return None
    if group not in (32, 64) and group % _UNIT:
        return f"group_size: {group}: expected 32, 64, a multiple of {_UNIT}, or None"
    whole = max(group, 64) if weight.bits < 8 else group  # nibbles of groups of 32 lie in pairs of groups
    if columns % whole:
        return f"in_features: {columns}: expected a multiple of {whole} for group_size {group}"
    return None


def prepare_integer(weight: UniformWeight) -> IntegerWeight:
    """Arranges a weight of 2, 3, 4 or 8 bits, once, at load. Raises ValueError for what is `unsupported`."""
    if reason := unsupported(weight):
        raise ValueError(reason)
    rows, columns = weight.codes.shape
    groups = int(weight.scale.shape[1])
    group_size = columns // groups
    unit = _unit(weight.bits, group_size, groups)
    codes = functional.pad(weight.codes, (0, -columns % unit))
    if weight.bits < 8:
        low, high = codes.view(rows, -1, 2, unit // 2).unbind(2)
        codes = (low & 15 | high << 4).flatten(1)
    return IntegerWeight(
        codes=codes.contiguous(),
        scale=weight.scale.T.contiguous(),
        zero_point=None if weight.zero_point is None else weight.zero_point.T.contiguous(),
        bits=weight.bits,
        group_size=group_size,
        out_features=rows,
        in_features=columns,
    )


def integer_gemm(
    x: PreparedInput,
    weight: IntegerWeight,
    *,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [tokens, out] of `out_dtype`, float16, bfloat16 or float32, from codes of x and of the weight.

    x: as `activations.prepare` makes it for this weight: int8 codes with their step, sums where the weight has zero points,
    and the projection when there is a branch. up: [out, rank], floats, or int8 codes whose step the projection bears. bias:
    [out], any float. Raises ValueError where they do not fit together.
    """
    _check(x, weight, up, bias)
    constants = launch.arithmetic(out_dtype)
    tokens, grouped = x.tokens, weight.groups > 1
    rank = 0 if up is None else int(up.shape[1])
    architecture = _architecture(x.values.device)
    blocks = _blocks(tokens, architecture)
    y = torch.empty(tokens, weight.out_features, dtype=out_dtype, device=x.values.device)
    grid = (triton.cdiv(tokens, blocks["BLOCK_M"]) * triton.cdiv(weight.out_features, blocks["BLOCK_N"]),)
    with launch.current(y.device):
        _multiply[grid](
            x.values,
            x.step,
            x.sums,
            weight.codes,
            weight.scale,
            weight.zero_point,
            x.projected,
            up,
            bias,
            y,
            tokens,
            weight.out_features,
            weight.in_features,
            weight.blocks,
            rank,
            PACKED=weight.bits < 8,
            UNIT=weight.unit,
            BLOCK=weight.block,
            GROUP=weight.group_size if grouped else 0,
            WHOLE=weight.in_features % weight.unit == 0,
            SHIFTED=weight.zero_point is not None,
            BRANCH=up is not None,
            BIASED=bias is not None,
            **blocks,
            **constants,
            WAIT=launch.waits(architecture // 10),
            num_warps=8,
            num_stages=_stages(architecture),
        )
    return y


def _check(x: PreparedInput, weight: IntegerWeight, up: Tensor | None, bias: Tensor | None) -> None:
    tokens, outs = x.tokens, weight.out_features
    if x.values.dtype is not torch.int8 or x.values.shape[1] != weight.in_features or x.step is None:
        raise ValueError(
            f"x: {x.values.dtype} {list(x.values.shape)}: expected int8 [tokens, {weight.in_features}] with their steps"
        )
    sums = (tokens, weight.blocks)
    if weight.zero_point is not None and (x.sums is None or tuple(x.sums.shape) != sums):
        found = None if x.sums is None else list(x.sums.shape)
        raise ValueError(f"x.sums: {found}: expected {list(sums)} for a weight with zero points")
    if (up is None) != (x.projected is None):
        raise ValueError(f"up: {'none' if up is None else 'given'}: expected it just when x is projected")
    if up is not None and x.projected is not None and tuple(up.shape) != (outs, x.projected.shape[1]):
        raise ValueError(f"up: {list(up.shape)}: expected [{outs}, {x.projected.shape[1]}]")
    if bias is not None and tuple(bias.shape) != (outs,):
        raise ValueError(f"bias: {list(bias.shape)}: expected [{outs}]")


def _unit(bits: int, group_size: int, groups: int) -> int:
    """A whole group or a part of one; with 4 bits and groups of 32 two of them, so that a dot has its 32 columns."""
    if groups == 1:
        return _UNIT
    return min(_UNIT, max(group_size, 64 if bits < 8 else 32))


def _blocks(tokens: int, architecture: int) -> dict[str, int]:
    """Of what compiled without spills, 256 x 64 spends the fewest instructions on a product: a weight is unpacked once for 256
    tokens, and more columns would need the registers of a second int32 tile. From sm_100 on, where sums are fetched from a
    memory of their own, there are registers for 128 x 64. Fewer tokens take lower tiles, down to the 64 rows of one
    warpgroup's instruction."""
    highest = 256 if architecture < 100 else 128
    return {"BLOCK_M": min(highest, max(64, triton.next_power_of_2(tokens))), "BLOCK_N": 64, "BLOCK_R": 32}


def _stages(architecture: int) -> int:
    """Tiles in flight. An sm_86 or sm_89 has shared memory for three of 256 * 128 + 64 * 128 bytes, less the first."""
    return 3 if architecture in (86, 89) else 4


def _architecture(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; 0 under the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


@triton.jit
def _halves(packed, ASM: tl.constexpr):
    """Sixteen times the codes in the low and in the high four bits of int8: the sign is where int8 has it, and no bits need
    be moved down."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0;",
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = (packed << 4).to(tl.int8), (packed & -16).to(tl.int8)
    return low, high


@triton.jit
def _input_tile(inputs, at, left, WHOLE: tl.constexpr):
    """Codes of x; zeros where fewer than all columns are left."""
    if WHOLE:
        return tl.load(inputs)
    else:
        return tl.load(inputs, mask=(at < left)[None, :], other=0)


@triton.jit
def _multiply(
    x,
    step,
    sums,
    codes,
    scale,
    zero_point,
    projected,
    up,
    bias,
    y,
    tokens,
    out_features,
    in_features,
    blocks,
    rank,
    PACKED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    SHIFTED: tl.constexpr,
    BRANCH: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y. GROUP 0: one scale per channel. WHOLE: in_features are whole units."""
    WIDTH: tl.constexpr = UNIT // 2 if PACKED else UNIT  # columns of a dot
    ONE: tl.constexpr = 16 if PACKED else 1  # what a code of 1 is multiplied as, see _halves
    # Tiles that run at the same time share columns of the weight, for 8 tiles of rows; then the next columns.
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    tile = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(tile // column_tiles, tile % column_tiles, row_tiles, column_tiles, 8)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last row and column the last are read again, which needs no mask; nothing of that is stored.
    row_read = tl.minimum(row, tokens - 1).to(tl.int64)
    column_read = tl.minimum(column, out_features - 1).to(tl.int64)
    units = tl.cdiv(in_features, UNIT)
    at = tl.arange(0, WIDTH)
    inputs = x + row_read[:, None] * in_features + at[None, :]
    weights = codes + column_read[:, None] * (units * WIDTH) + at[None, :]
    exact = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for unit in range(units):
        left = in_features - unit * UNIT
        first = _input_tile(inputs, at, left, WHOLE)
        if PACKED:
            second = _input_tile(inputs + WIDTH, at, left - WIDTH, WHOLE)
            low, high = _halves(tl.load(weights), ASM)
        else:
            low = tl.load(weights)
        inputs += UNIT
        weights += WIDTH
        if GROUP == 0:
            exact = tl.dot(first, tl.trans(low), exact, out_dtype=tl.int32)
            if PACKED:
                exact = tl.dot(second, tl.trans(high), exact, out_dtype=tl.int32)
        else:
            group = unit * UNIT // GROUP
            product = tl.dot(first, tl.trans(low), out_dtype=tl.int32)
            if PACKED and GROUP >= UNIT:
                product = tl.dot(second, tl.trans(high), product, out_dtype=tl.int32)
            total += product.to(tl.float32) * tl.load(scale + group * out_features + column_read)[None, :].to(
                tl.float32
            )
            if PACKED and GROUP < UNIT:  # a half is a group of its own
                product = tl.dot(second, tl.trans(high), out_dtype=tl.int32)
                factor = tl.load(scale + (group + 1) * out_features + column_read).to(tl.float32)
                total += product.to(tl.float32) * factor[None, :]
    if GROUP == 0:
        if SHIFTED:
            sum_of_codes = tl.zeros((BLOCK_M,), tl.int32)
            for block in range(blocks):
                sum_of_codes += tl.load(sums + row_read * blocks + block).to(tl.int32)
            zero = tl.load(zero_point + column_read).to(tl.int32) * ONE
            exact -= sum_of_codes[:, None] * zero[None, :]
        total = exact.to(tl.float32) * tl.load(scale + column_read).to(tl.float32)[None, :]
    elif SHIFTED:
        for block in range(blocks):
            group = block * BLOCK // GROUP
            zero = tl.load(zero_point + group * out_features + column_read).to(tl.float32) * ONE
            weight = zero * tl.load(scale + group * out_features + column_read).to(tl.float32)
            total -= tl.load(sums + row_read * blocks + block)[:, None] * weight[None, :]
    total *= tl.load(step + row_read)[:, None] * (1.0 / ONE)
    if BRANCH:
        for first_rank in range(0, rank, BLOCK_R):
            at_rank = first_rank + tl.arange(0, BLOCK_R)
            inside = (at_rank < rank)[None, :]
            left_side = tl.load(projected + row_read[:, None] * rank + at_rank[None, :], mask=inside, other=0.0)
            left_side = settled(left_side, WAIT)
            right_side = tl.load(up + column_read[:, None] * rank + at_rank[None, :], mask=inside, other=0.0)
            total = tl.dot(left_side.to(COMPUTE), tl.trans(right_side.to(COMPUTE)), total, input_precision=PRECISION)
    if BIASED:
        total += tl.load(bias + column_read).to(tl.float32)[None, :]
    inside = (row < tokens)[:, None] & (column < out_features)[None, :]
    to = y + row.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)
