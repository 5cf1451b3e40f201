"""Waiting for a warpgroup's products before registers are computed that they may still be reading; see `launch.waits`."""

# Bodies of jit functions hold values of the triton language; they carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def settled(values, WAIT: tl.constexpr):
    """The values, that a product's left operand is computed from. WAIT: known only when no product is under way."""
    if WAIT:
        PACK: tl.constexpr = 32 // values.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;",
            "=r,r",
            [values],
            dtype=values.dtype,
            is_pure=False,
            pack=PACK,
        )
    else:
        return values
