"""Several blobs of tensors as one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterweight.workers.ahead import ReadAhead
from counterweight.workers.checkpoint import serialize_safetensors
from counterweight.workers.errors import IntegrityError
from counterweight.workers.join import join_tensors
from counterweight.workers.storage import sha256_hex
from counterweight.workers.storage.file import FileStore
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import Workspace

PARTS = [
    {"b.1": torch.arange(6.0).reshape(2, 3), "b.2": torch.arange(4, dtype=torch.uint8)},
    {"a.1": torch.full((3,), 7.0), "a.2": torch.ones(2, 2, dtype=torch.uint8)},
]
"""Two dtypes in each: a file has the wider one of all parts first."""


class CountingStore(FileStore):
    """Remembers which objects were read whole."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.whole: list[str] = []

    def _read(self, key: str) -> bytes:
        self.whole.append(key)
        return super()._read(key)


@pytest.mark.parametrize("on", [False, True])
def test_the_file_is_that_of_all_tensors_together_and_each_part_is_read_once_for_each_dtype(
    on: bool, tmp_path: Path
) -> None:
    store, ahead = CountingStore(tmp_path), ReadAhead(on=on)
    workspace = Workspace(store)
    blobs = [put_tensors(workspace, part) for part in PARTS]
    parts = [(blob, tuple(part)) for blob, part in zip(blobs, PARTS, strict=True)]
    written = join_tensors(workspace, parts, store, "joined", ahead)
    ahead.close()
    expected = serialize_safetensors(PARTS[0] | PARTS[1])
    assert (tmp_path / "joined").read_bytes() == expected
    assert (written.size, written.sha256) == (len(expected), sha256_hex(expected))
    first, second = (blob.key for blob in blobs)
    assert store.whole == [second, first, second, first]


def test_a_name_in_two_parts_and_a_header_that_lies_leave_no_file(tmp_path: Path) -> None:
    store, ahead = FileStore(tmp_path), ReadAhead(on=False)
    workspace = Workspace(store)
    blob, other = put_tensors(workspace, PARTS[0]), put_tensors(workspace, {"b.1": torch.ones(1)})
    with pytest.raises(IntegrityError, match=r"tensor b\.1 stands in two parts: "):
        join_tensors(workspace, [(blob, ("b.1",)), (other, ("b.1",))], store, "joined", ahead)
    path = tmp_path / blob.key
    path.write_bytes(path.read_bytes().replace(b"[2,3]", b"[3,2]"))
    with pytest.raises(IntegrityError, match="sha256"):
        join_tensors(workspace, [(blob, ("b.1", "b.2"))], store, "joined", ahead)
    assert not (tmp_path / "joined").exists()
