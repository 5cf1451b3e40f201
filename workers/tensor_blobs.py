"""Tensors as blobs of a workspace, each a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from counterweight.workers.checkpoint.writer import read_safetensors, safetensors_pieces
from counterweight.workers.workspace import Blob, Workspace


def blob_of(tensors: Mapping[str, Tensor]) -> Blob:
    """The blob that tensors are as one safetensors file, which is written nowhere."""
    digest, size = hashlib.sha256(), 0
    for piece in safetensors_pieces(tensors):
        digest.update(piece)
        size += len(piece)
    return Blob(sha256=digest.hexdigest(), size=size)


def put_tensors(
    workspace: Workspace, tensors: Mapping[str, Tensor], *, durable: bool = True, blob: Blob | None = None
) -> Blob:
    """Stores tensors as one blob (`Workspace.put`). blob: their `blob_of`, where the caller knows it."""
    blob = blob_of(tensors) if blob is None else blob
    return workspace.put(blob, partial(safetensors_pieces, tensors), durable=durable)


def get_tensors(workspace: Workspace, blob: Blob) -> dict[str, Tensor]:
    """The blob's tensors, every byte verified. IntegrityError, ObjectNotFoundError."""
    return read_safetensors(workspace.get_bytes(blob), file=workspace.store.uri_of(blob.key))
