"""Digests of tensors in memory: equal to those of the same tensors in a file (`inspector` says of what)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from counterweight.workers.checkpoint.buffers import flat_bytes, stored_dtype
from counterweight.workers.checkpoint.dtypes import StoredDtype
from counterweight.workers.checkpoint.inspector import Inspector, TensorDigest


def tensor_digest(tensor: Tensor) -> str:
    """The sha256 (hex) of a tensor in memory; equal to `Checkpoint.digest` of the same tensor in a file.

    Raises `CheckpointError` for a dtype that the format's tables do not have.
    """
    dtype = stored_dtype(tensor.dtype, where=f"tensor of shape {list(tensor.shape)}")
    return stacked_digest(dtype, tensor.shape, [tensor]).sha256


def stacked_digest(dtype: StoredDtype, shape: Sequence[int], parts: Iterable[Tensor]) -> TensorDigest:
    """`tensor_digest`, and finiteness, of the tensor of this shape whose `parts` on the first axis come in order."""
    inspector = Inspector(dtype, shape)
    for part in parts:
        inspector.update(flat_bytes(part))
    return inspector.result()
