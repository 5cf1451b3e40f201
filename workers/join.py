"""Several safetensors blobs as one file, for formats that allow only one (PEFT adapters)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from counterweight.workers.checkpoint.writer import write_safetensors
from counterweight.workers.errors import IntegrityError
from counterweight.workers.storage import ObjectStore
from counterweight.workers.storage.base import Written
from counterweight.workers.workspace import Blob, Workspace


def join_tensors(
    workspace: Workspace, parts: Sequence[tuple[Blob, Sequence[str]]], store: ObjectStore, key: str
) -> Written:
    """Writes the tensors of all parts as one file, one part in memory at a time, every byte read verified.

    parts: each blob with the names of its tensors; a name in two parts is an IntegrityError.
    """
    return write_safetensors(store, key, _Parts(workspace, parts))


class _Parts(Mapping[str, Tensor]):
    """Tensors by name, loaded a blob at a time: names of one blob are asked for together, so one blob is kept."""

    def __init__(self, workspace: Workspace, parts: Sequence[tuple[Blob, Sequence[str]]]) -> None:
        self._workspace = workspace
        self._blob_of: dict[str, Blob] = {}
        for blob, names in parts:
            for name in names:
                if name in self._blob_of:
                    raise IntegrityError(f"tensor {name} stands in two parts: {self._blob_of[name].key}, {blob.key}")
                self._blob_of[name] = blob
        self._loaded: tuple[Blob, dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        blob = self._blob_of[name]
        if self._loaded is None or self._loaded[0] != blob:
            self._loaded = (blob, self._workspace.get_tensors(blob))
        return self._loaded[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blob_of)

    def __len__(self) -> int:
        return len(self._blob_of)
