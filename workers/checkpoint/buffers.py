"""Tensors as the flat bytes of the format, and back, without a copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.errors import CheckpointError

Bytes = NDArray[np.uint8]


def allocate(entry: TensorEntry) -> tuple[Tensor, Bytes]:
    """An uninitialised CPU tensor of the entry's shape and dtype in memory of its own, and its bytes, to be
    filled."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    return tensor, flat_bytes(tensor)


def flat_bytes(tensor: Tensor) -> Bytes:
    """A dense tensor's elements as bytes, row-major: a view if it is contiguous on the CPU, else a copy."""
    flat = tensor.detach().resolve_neg().cpu().contiguous().reshape(-1)
    # One element is contiguous whatever its stride, but only a stride of one can be viewed as bytes.
    result: Bytes = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()
    return result


def check_booleans(entry: TensorEntry, tensor: Tensor) -> None:
    """Raises `CheckpointError` when a BOOL tensor has bytes other than 0 and 1, on which torch's kernels
    disagree."""
    if tensor.dtype == torch.bool and tensor.numel():
        largest = int(flat_bytes(tensor).max())
        if largest > 1:
            raise CheckpointError(f"{entry.file}: tensor {show(entry.name)}: a BOOL of {largest}, expected 0 or 1")
