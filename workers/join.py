"""Several safetensors blobs as one file, for formats that allow only one (PEFT adapters)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor

from counterweight.workers.ahead import ReadAhead
from counterweight.workers.checkpoint.dtypes import StoredDtype
from counterweight.workers.checkpoint.writer import write_in_turn, writing_order
from counterweight.workers.errors import IntegrityError
from counterweight.workers.storage import ObjectStore
from counterweight.workers.storage.base import Written
from counterweight.workers.tensor_blobs import get_tensors
from counterweight.workers.workspace import Blob, Workspace


def join_tensors(
    workspace: Workspace,
    parts: Sequence[tuple[Blob, Sequence[str]]],
    store: ObjectStore,
    key: str,
    ahead: ReadAhead,
) -> Written:
    """Writes the tensors of all parts as one file, every byte read verified; of all parts the headers are read first, then one
    part is in memory at a time, and another where `ahead` reads it meanwhile.

    parts: each blob with the names of its tensors; a name in two parts is an IntegrityError.
    """
    blob_of: dict[str, Blob] = {}
    layout: dict[str, tuple[StoredDtype, tuple[int, ...]]] = {}
    for blob, names in parts:
        entries = workspace.get_header(blob).entries
        for name in names:
            if name in blob_of:
                raise IntegrityError(f"tensor {name} stands in two parts: {blob_of[name].key}, {blob.key}")
            blob_of[name] = blob
            layout[name] = (entries[name].dtype, entries[name].shape)
    # Names of one blob follow each other, once for each dtype.
    turns = [(blob, list(names)) for blob, names in groupby(writing_order(layout), blob_of.__getitem__)]

    def read(place: int) -> dict[str, Tensor]:
        return get_tensors(workspace, turns[place][0])

    def in_turn() -> Iterator[Tensor]:
        for (_, names), tensors in zip(turns, ahead.in_turn(key, len(turns), read), strict=True):
            for name in names:
                yield tensors.pop(name)
            del tensors  # before the next part is waited for

    return write_in_turn(store, key, layout, in_turn())
