"""Hadamard transforms on the GPU: `kernels.hadamard.Hadamard.apply`, in one pass over the memory where a block fits.

A block of order core * 2**p is a tile [core, 2**p]. Kronecker factors commute: the core is multiplied first, while x has its
few bits and a tensor core's products with +-1 are exact; then come p butterflies in float32 registers. What is too large
for one tile takes several passes, with float32 between them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Bodies of Triton kernels have no Python types; the functions that launch them do.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterweight.kernels.gpu import launch
from counterweight.kernels.hadamard import Hadamard, hadamard_matrix

__all__ = ["transform"]

_ELEMENTS_PER_WARP = 2048
"""64 float32 a thread: half of the registers that are left to it with 16 warps."""
_LARGEST_TILE = 16 * _ELEMENTS_PER_WARP
_TILE = 4096  # elements where more are not needed: several blocks, or channels that are not mixed, side by side
_SMALLEST_DOT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Mixing of the two middle axes of x seen as [outer, core, 2**doublings, inner]."""

    core: int
    doublings: int
    inner: int

    def tile(self) -> dict[str, int]:
        """The constants ROWS (core), OUTERS and CHANNELS: a tile is [ROWS, OUTERS * 2**doublings * CHANNELS]."""
        rows = _rows(self.core)
        span = 1 << self.doublings
        columns = max(span, _TILE // rows, 1 if self.core == 1 else _SMALLEST_DOT)
        channels = min(triton.next_power_of_2(self.inner), columns // span)
        return {"ROWS": rows, "OUTERS": columns // (span * channels), "CHANNELS": channels}


def transform(x: Tensor, hadamard: Hadamard) -> Tensor:
    """x [tokens, width], contiguous, float16, bfloat16 or float32 -> x transformed, of the same shape and dtype.

    Equal to `hadamard.apply(x)` up to the order of float32 sums. Signs and cores are made, and moved to the GPU, at the
    first call with a transform: let there be one before a CUDA graph is captured. Raises ValueError for another width, layout
    or dtype.
    """
    if x.ndim != 2 or x.shape[1] != hadamard.width or not x.is_contiguous():
        raise ValueError(f"x: {list(x.shape)}, strides {x.stride()}: expected [tokens, {hadamard.width}], contiguous")
    constants = launch.arithmetic(x.dtype)
    passes = _passes(hadamard)
    y = x
    with launch.current(x.device):
        for number, mixed in enumerate(passes):
            first, last = number == 0, number == len(passes) - 1
            source, y = y, torch.empty_like(x, dtype=x.dtype if last else torch.float32)
            tile = mixed.tile()
            outers = x.numel() // (mixed.core * mixed.inner << mixed.doublings)
            grid = (triton.cdiv(outers, tile["OUTERS"]), triton.cdiv(mixed.inner, tile["CHANNELS"]))
            _mix[grid](
                source,
                y,
                _signs(hadamard, x.device) if first else None,
                _core_matrix(mixed.core, x.dtype, x.device) if mixed.core > 1 else None,
                outers,
                1 / math.sqrt(hadamard.order) if last else 1.0,
                WIDTH=hadamard.width,
                CORE=mixed.core,
                DOUBLINGS=mixed.doublings,
                INNER=mixed.inner,
                **tile,
                SIGNED=first and hadamard.seed is not None,
                COMPUTE=constants["COMPUTE"],
                PRECISION=constants["PRECISION"],
                num_warps=_warps(tile, mixed.doublings),
                num_stages=1,
            )
    return y


def _warps(tile: dict[str, int], doublings: int) -> int:
    elements = tile["ROWS"] * tile["OUTERS"] * tile["CHANNELS"] << doublings
    return min(max(4, elements // _ELEMENTS_PER_WARP), 16)


def _rows(core: int) -> int:
    return 1 if core == 1 else max(_SMALLEST_DOT, triton.next_power_of_2(core))


@cache
def _passes(hadamard: Hadamard) -> tuple[_Pass, ...]:
    """One pass if its tile is not too large; else the core alone, then the doublings, the outermost first."""
    core = _core(hadamard.order)
    doublings = (hadamard.order // core).bit_length() - 1
    if _rows(core) << doublings <= _LARGEST_TILE:
        return (_Pass(core=core, doublings=doublings, inner=hadamard.inner),)
    passes = [] if core == 1 else [_Pass(core=core, doublings=0, inner=hadamard.inner << doublings)]
    parts = -(-doublings // (_LARGEST_TILE.bit_length() - 1))
    for part in range(parts):
        here = doublings // parts + (part < doublings % parts)
        doublings_after = doublings - here - sum(mixed.doublings for mixed in passes)
        passes.append(_Pass(core=1, doublings=here, inner=hadamard.inner << doublings_after))
    return tuple(passes)


def _core(order: int) -> int:
    """Order of the factor of `hadamard_matrix(order)` that is no power of Sylvester's; 1 without one."""
    while order % 2 == 0 and Hadamard(size=order // 2).order == order // 2:
        order //= 2
    return order


@cache
def _core_matrix(core: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The core's transpose, +-1, among zeros up to a whole tile."""
    rows = _rows(core)
    matrix = torch.zeros(rows, rows, dtype=dtype)
    matrix[:core, :core] = hadamard_matrix(core).T.sign()
    return matrix.to(device)


@cache
def _signs(hadamard: Hadamard, device: torch.device) -> Tensor | None:
    """A sign for each channel, [width] int8."""
    signs = hadamard.signs
    return None if signs is None else signs.to(torch.int8).repeat_interleave(hadamard.inner).to(device)


@triton.jit
def _signs_at(signs, first, at, mask, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Signs of the elements first + at of x; tiles begin at multiples of TILE."""
    channel = (first % WIDTH).to(tl.int32) + at
    if WIDTH % TILE != 0:  # then a tile may reach into the next token
        channel = channel % WIDTH
    return tl.load(signs + channel, mask=mask, other=0).to(tl.float32)


@triton.jit
def _mix(
    x,
    y,
    signs,
    core,
    outers,
    scale,
    WIDTH: tl.constexpr,
    CORE: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    OUTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = scale * (core (x) Sylvester's of 2**DOUBLINGS) x along the middle axes of x [outers, CORE, 2**DOUBLINGS, INNER]."""
    SPAN: tl.constexpr = 1 << DOUBLINGS
    COLUMNS: tl.constexpr = OUTERS * SPAN * CHANNELS
    column = tl.arange(0, COLUMNS)
    # A row of the tile is one of the core's; what butterflies mix lies in the columns of a row.
    first = tl.program_id(0).to(tl.int64) * (OUTERS * CORE * SPAN * INNER)
    outer = column // (SPAN * CHANNELS)
    inside = outer < outers - tl.program_id(0) * OUTERS
    if INNER == 1:
        start = outer * (CORE * SPAN) + column % SPAN
    else:
        channel = tl.program_id(1) * CHANNELS + column % CHANNELS
        inside &= channel < INNER
        start = outer * (CORE * SPAN * INNER) + column // CHANNELS % SPAN * INNER + channel
    if CORE == 1:
        at = start[None, :]
        mask = inside[None, :]
        mixed = tl.load(x + first + at, mask=mask, other=0.0).to(tl.float32)
        if SIGNED:
            mixed *= _signs_at(signs, first, at, mask, WIDTH, OUTERS * CORE * SPAN * INNER)
    else:
        STEP: tl.constexpr = 16 if ROWS == 16 or ROWS > 512 else 32  # columns that fit shared memory
        mixed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, CORE, STEP):
            row = step + tl.arange(0, STEP)
            at = start[None, :] + row[:, None] * (SPAN * INNER)
            mask = inside[None, :] & (row[:, None] < CORE)
            values = tl.load(x + first + at, mask=mask, other=0.0).to(tl.float32)
            if SIGNED:
                values *= _signs_at(signs, first, at, mask, WIDTH, OUTERS * CORE * SPAN * INNER)
            factor = tl.load(core + tl.arange(0, ROWS)[:, None] * ROWS + row[None, :])
            mixed = tl.dot(factor.to(COMPUTE), values.to(COMPUTE), mixed, input_precision=PRECISION)
    for doubling in tl.static_range(DOUBLINGS):
        pairs = tl.reshape(mixed, (ROWS * COLUMNS // (2 * CHANNELS << doubling), 2, CHANNELS << doubling))
        upper, lower = tl.split(tl.permute(pairs, (0, 2, 1)))
        pairs = tl.permute(tl.join(upper + lower, upper - lower), (0, 2, 1))
        mixed = tl.reshape(pairs, (ROWS, COLUMNS))
    row = tl.arange(0, ROWS)
    at = start[None, :] + row[:, None] * (SPAN * INNER)
    tl.store(y + first + at, (mixed * scale).to(y.dtype.element_ty), mask=inside[None, :] & (row[:, None] < CORE))
