"""Tensors with poison around them: the interpreter does not notice a kernel that reads or writes beyond its tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BAND = 4096  # elements before and after


def guarded(tensor: Tensor) -> Tensor:
    """The same values, contiguous, between two bands of NaN (of the dtype's extreme for integers): a read beyond shows in the
    results."""
    count = tensor.numel()
    poison = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((count + 2 * _BAND,), poison, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[_BAND : _BAND + count].view(tensor.shape)
    return inside.copy_(tensor)


def bands_are_intact(tensor: Tensor) -> bool:
    """Whether what surrounds a `guarded` tensor is still what it was: a write beyond shows here."""
    count = tensor.numel()
    storage = torch.tensor([], dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    around = torch.cat([storage[:_BAND], storage[_BAND + count :]])
    poisoned = around.isnan() if tensor.is_floating_point() else around == torch.iinfo(tensor.dtype).max
    return bool(poisoned.all())
