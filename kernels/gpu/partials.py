"""Sums that several programs share: partial sums side by side in memory, added in one order. So there are no atomics, and the
same bits every time."""

# Bodies of jit functions hold values of the triton language; they carry no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024  # that one program adds over all parts


@contextmanager
def summed_over(splits: int, out: Tensor) -> Iterator[Tensor]:
    """What a kernel that sums in `splits` parts writes to: [splits, ..] float32, added into out in their order afterwards; out
    itself when it is one part."""
    if splits == 1:
        yield out
        return
    partials = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    yield partials
    grid = (-(-out.numel() // _ELEMENTS),)
    add_partials[grid](partials, out, out.numel(), SPLITS=splits, BLOCK=_ELEMENTS)


@triton.jit
def add_partials(partials, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = partials [SPLITS, size] float32, added in the order of the splits: the same bits every time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(partials + at, mask=inside, other=0.0)
        partials += size
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
