"""A large file that several workers read again, each some of its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.checkpoint.writer import write_safetensors
from counterweight.workers.context import TaskContext
from counterweight.workers.storage.file import FileStore
from counterweight.workers.tasks.files import CheckTensors

TENSORS = {"a": torch.arange(6.0), "b": torch.arange(4, dtype=torch.uint8), "c": torch.ones(2, 3)}
PATH = "adapter.safetensors"


def check(root: Path, *names: str, count: int = len(TENSORS)) -> bool:
    task = CheckTensors(
        root=root.as_uri(),
        path=PATH,
        tensors={name: tensor_digest(TENSORS[name]) for name in names},
        count=count,
        bytes=0,
        part="",
    )
    return task.run(TaskContext(torch.device("cpu"), 1))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_safetensors(FileStore(tmp_path), PATH, TENSORS)
    return tmp_path


def test_every_byte_is_somebodys_to_check(root: Path) -> None:
    """Whichever of them is another, one of the parts says so."""
    whole = (root / PATH).read_bytes()
    parts = [("a",), ("b", "c")]
    assert all(check(root, *names) for names in parts)
    for place in range(len(whole)):
        (root / PATH).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not all(check(root, *names) for names in parts), place
    (root / PATH).write_bytes(whole[:-1])
    assert not check(root, "a")


def test_each_reads_its_own_tensors_alone(root: Path) -> None:
    whole = (root / PATH).read_bytes()
    (root / PATH).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert check(root, "a")
    assert check(root, "c")
    assert not check(root, "b"), "of the narrowest type, which a file has last"


def test_a_file_has_no_other_tensors_than_all_parts_together(root: Path) -> None:
    assert not check(root, "a", count=len(TENSORS) - 1)
