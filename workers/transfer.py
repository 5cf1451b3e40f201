"""Tensors between the host and a GPU, through pinned memory.

Pageable memory is copied by the driver piece by piece: 2.1 GB/s were measured on an H200's host, whose pinned memory kernels
read at up to 41 GB/s (`benchmarks/results/2026-11-26-rates-h200.md`, `2026-11-26-kernels-prompts.md`). torch keeps pinned
memory for the next tensor of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A tensor of any device in the host's memory."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
