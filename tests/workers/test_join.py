"""Several blobs of tensors as one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from counterweight.workers.ahead import ReadAhead
from counterweight.workers.checkpoint import serialize_safetensors
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.checkpoint.header import LENGTH_BYTES
from counterweight.workers.errors import IntegrityError
from counterweight.workers.join import Awaited, BegunFiles, Part, join_tensors
from counterweight.workers.storage import sha256_hex
from counterweight.workers.storage.base import Writer, Written
from counterweight.workers.storage.file import FileStore
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import Workspace

PARTS = [
    {"b.1": torch.arange(6.0).reshape(2, 3), "b.2": torch.arange(4, dtype=torch.uint8)},
    {"a.1": torch.full((3,), 7.0), "a.2": torch.ones(2, 2, dtype=torch.uint8)},
]
"""Two dtypes in each: a file has the wider one of all parts first."""


class CountingStore(FileStore):
    """Remembers of which objects more than a header was read, and counts the writers that were opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []
        self.opened = 0

    def read_range(self, key: str, start: int, length: int) -> bytes:
        self.asked += [key] if start > LENGTH_BYTES else []
        return super().read_range(key, start, length)

    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Writer:
        self.opened += key == "joined"
        return super().open_writer(key, durable=durable, sha256=sha256)


def put(workspace: Workspace, tensors: Mapping[str, Tensor]) -> Part:
    return put_tensors(workspace, tensors), {name: tensor_digest(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("on", [False, True])
def test_the_file_is_that_of_all_tensors_together_and_each_part_is_read_once_for_each_dtype(
    on: bool, tmp_path: Path
) -> None:
    store, ahead = CountingStore(tmp_path), ReadAhead(on=on)
    workspace = Workspace(store)
    parts = [put(workspace, part) for part in PARTS]
    written = join_tensors(workspace, parts, store, "joined", ahead, BegunFiles())
    ahead.close()
    expected = serialize_safetensors(PARTS[0] | PARTS[1])
    assert (tmp_path / "joined").read_bytes() == expected
    assert written == Written(size=len(expected), sha256=sha256_hex(expected))
    first, second = (blob.key for blob, _ in parts)
    assert store.asked == [second, first, second, first]


def test_a_name_in_two_parts_and_a_header_that_lies_leave_no_file(tmp_path: Path) -> None:
    store, ahead = FileStore(tmp_path), ReadAhead(on=False)
    workspace = Workspace(store)
    part, other = put(workspace, PARTS[0]), put(workspace, {"b.1": torch.ones(1)})
    with pytest.raises(IntegrityError, match=r"tensor b\.1 stands in two parts: "):
        join_tensors(workspace, [part, other], store, "joined", ahead, BegunFiles())
    path = tmp_path / part[0].key
    path.write_bytes(path.read_bytes().replace(b"[2,3]", b"[3,2]"))
    with pytest.raises(IntegrityError, match="sha256"):
        join_tensors(workspace, [part], store, "joined", ahead, BegunFiles())
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


BLOCKS = [
    {f"block.{index}.x": torch.full((4, 2), float(index)), f"block.{index}.y": torch.ones(3)} for index in range(4)
]
"""Of one dtype, so that a file has one behind the other."""


def like(part: Part, index: int, *others: int) -> list[Awaited]:
    blob, digests = part
    return [(blob, {name: name.replace(f".{index}.", f".{other}.") for name in digests}) for other in others]


def test_a_file_is_begun_with_what_is_there_and_finished_with_the_rest(tmp_path: Path) -> None:
    store, ahead, begun = CountingStore(tmp_path), ReadAhead(on=False), BegunFiles()
    workspace = Workspace(store)
    parts = [put(workspace, block) for block in BLOCKS]
    for there in (1, 3):
        awaited = like(parts[there - 1], there - 1, *range(there, 4))
        assert join_tensors(workspace, parts[:there], store, "joined", ahead, begun, awaited) is None
        assert not (tmp_path / "joined").exists()
    written = join_tensors(workspace, parts, store, "joined", ahead, begun)
    expected = serialize_safetensors({name: tensor for block in BLOCKS for name, tensor in block.items()})
    assert (tmp_path / "joined").read_bytes() == expected
    assert written == Written(size=len(expected), sha256=sha256_hex(expected))
    assert store.asked == [blob.key for blob, _ in parts], "nothing is read a second time"
    assert store.opened == 1


def test_what_is_begun_stops_before_the_first_tensor_that_is_not_there(tmp_path: Path) -> None:
    store, ahead, begun = CountingStore(tmp_path), ReadAhead(on=False), BegunFiles()
    workspace = Workspace(store)
    parts = [put(workspace, block) for block in BLOCKS]
    join_tensors(workspace, [parts[0], parts[2]], store, "joined", ahead, begun, like(parts[0], 0, 1))
    assert store.asked == [parts[0][0].key]


def test_a_file_is_begun_anew_where_its_last_part_is_unlike_the_others(tmp_path: Path) -> None:
    store, ahead, begun = CountingStore(tmp_path), ReadAhead(on=False), BegunFiles()
    workspace = Workspace(store)
    unlike = {"block.1.x": torch.ones(7)}
    parts = [put(workspace, BLOCKS[0]), put(workspace, unlike)]
    join_tensors(workspace, parts[:1], store, "joined", ahead, begun, like(parts[0], 0, 1))
    join_tensors(workspace, parts, store, "joined", ahead, begun)
    assert (tmp_path / "joined").read_bytes() == serialize_safetensors(BLOCKS[0] | unlike)
    assert store.opened == 2
    assert not [path for path in tmp_path.iterdir() if path.is_file() and path.name != "joined"]


def test_files_are_begun_beside_each_other_and_discarded_with_their_worker(tmp_path: Path) -> None:
    store, ahead, begun = CountingStore(tmp_path), ReadAhead(on=False), BegunFiles()
    workspace = Workspace(store)
    part = put(workspace, BLOCKS[0])
    for key in ("joined", "other"):
        join_tensors(workspace, [part], store, key, ahead, begun, like(part, 0, 1))
    join_tensors(workspace, [part, put(workspace, BLOCKS[1])], store, "joined", ahead, begun)
    assert store.opened == 1
    begun.drop()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["joined"]
