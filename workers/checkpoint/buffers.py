"""Tensors as the flat bytes of the format, and back, without a copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from counterweight.workers.checkpoint.dtypes import DTYPES, StoredDtype
from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.errors import CheckpointError

Bytes = NDArray[np.uint8]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The format's word -> torch's dtype."""

_STORED: Mapping[torch.dtype, StoredDtype] = {TORCH_DTYPES[word]: dtype for word, dtype in DTYPES.items()}


def stored_dtype(dtype: torch.dtype, *, where: str) -> StoredDtype:
    """The format's name for a tensor's dtype. Raises `CheckpointError`, beginning with `where`, for one that it does not write
    here."""
    stored = _STORED.get(dtype)
    if stored is None:
        raise CheckpointError(f"{where}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
    return stored


def allocate(entry: TensorEntry) -> tuple[Tensor, Bytes]:
    """An uninitialised CPU tensor of the entry's shape and dtype in memory of its own, and its bytes, to be
    filled."""
    tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype.word])
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
