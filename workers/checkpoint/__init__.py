"""Safetensors checkpoints: a strict reader that works by range requests, and a streaming writer.

Invariants: opening reads headers, never a tensor. What a strict reading refuses is refused before any work
begins, with everything that is wrong in one error. Memory is bounded by the tensors asked for plus 64 MiB.
Equal tensors have equal digests; equal input to the writer gives equal bytes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.workers.checkpoint.digest import tensor_digest
    from counterweight.workers.checkpoint.header import TensorEntry
    from counterweight.workers.checkpoint.inspector import TensorDigest
    from counterweight.workers.checkpoint.reader import Checkpoint
    from counterweight.workers.checkpoint.writer import read_safetensors, serialize_safetensors, write_safetensors

__all__ = [
    "Checkpoint",
    "TensorDigest",
    "TensorEntry",
    "read_safetensors",
    "serialize_safetensors",
    "tensor_digest",
    "write_safetensors",
]

_MODULES = {
    "Checkpoint": "reader",
    "TensorDigest": "inspector",
    "TensorEntry": "header",
    "read_safetensors": "writer",
    "serialize_safetensors": "writer",
    "tensor_digest": "digest",
    "write_safetensors": "writer",
}


def __getattr__(name: str) -> object:
    # torch is imported when something of it is asked for: a first look at a config need not wait for it
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
