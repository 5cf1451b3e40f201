"""Downloads to local files: whole, verified, resumed."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterweight.workers.errors import IntegrityError, ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage import ObjectStore, fetch, sha256_hex
from counterweight.workers.storage.base import STREAM_CHUNK
from counterweight.workers.storage.file import FileStore

DATA = random.Random(0).randbytes(100_000)
DIGEST = sha256_hex(DATA)


class Counting(FileStore):
    """Counts the bytes that it streams, and breaks off or lies where told."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.streamed = 0
        self.break_after: int | None = None
        self.flips = 0

    def stream(self, key: str, *, start: int = 0, chunk: int = STREAM_CHUNK) -> Iterator[bytes]:
        for piece in super().stream(key, start=start, chunk=10_000):
            if self.break_after is not None and self.streamed >= self.break_after:
                raise StorageError("read: broke off")
            self.streamed += len(piece)
            if self.flips:
                self.flips -= 1
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            yield piece


@pytest.fixture
def source(tmp_path: Path) -> Counting:
    store = Counting(tmp_path / "store")
    store.write("a/model", DATA)
    return store


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target" / "model"


def test_fetch_from_every_store(store: ObjectStore, target: Path) -> None:
    store.write("a/model", DATA)
    store.write("a/empty", b"")
    fetch(store, "a/model", target, size=len(DATA), sha256=DIGEST)
    fetch(store, "a/empty", target.with_name("empty"), size=0, sha256=sha256_hex(b""))
    assert target.read_bytes() == DATA
    assert sorted(path.name for path in target.parent.iterdir()) == ["empty", "model"]


def test_what_is_there_is_not_fetched_again(source: Counting, target: Path) -> None:
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    source.delete("a/model")
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert source.streamed == len(DATA)


def test_what_is_there_and_differs_is_replaced(source: Counting, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert target.read_bytes() == DATA


def test_a_broken_download_is_continued(source: Counting, target: Path) -> None:
    source.break_after = 40_000
    with pytest.raises(StorageError, match="broke off"):
        fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert [path.name for path in target.parent.iterdir()] == ["model.partial"]
    source.break_after = None
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert source.streamed == len(DATA)  # no byte twice
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("left", [b"x" * 1000, DATA + b"x", DATA[:-1] + b"x"], ids=["wrong", "long", "last byte"])
def test_a_spoilt_partial_file_is_started_afresh(source: Counting, target: Path, left: bytes) -> None:
    target.parent.mkdir()
    target.with_name("model.partial").write_bytes(left)
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert target.read_bytes() == DATA


def test_a_complete_partial_file_needs_no_more_bytes(source: Counting, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("model.partial").write_bytes(DATA)
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert (source.streamed, target.read_bytes()) == (0, DATA)


def test_a_bit_flipped_on_the_way_is_fetched_again(source: Counting, target: Path) -> None:
    source.flips = 1
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert source.streamed == 2 * len(DATA)
    assert target.read_bytes() == DATA


def test_an_object_that_differs_never_appears(source: Counting, target: Path) -> None:
    with pytest.raises(IntegrityError, match=f"sha256 is {DIGEST}, expected {'0' * 64}, twice"):
        fetch(source, "a/model", target, size=len(DATA), sha256="0" * 64)
    assert list(target.parent.iterdir()) == []


def test_an_object_of_another_size_is_refused_before_it_is_fetched(source: Counting, target: Path) -> None:
    with pytest.raises(IntegrityError, match=r"100000 bytes, expected 99999"):
        fetch(source, "a/model", target, size=99_999, sha256=DIGEST)
    assert source.streamed == 0
    assert not target.parent.exists()


def test_an_absent_object(source: Counting, target: Path) -> None:
    with pytest.raises(ObjectNotFoundError):
        fetch(source, "a/none", target, size=1, sha256=DIGEST)


def test_two_processes_do_not_share_a_partial_file(source: Counting, target: Path) -> None:
    target.parent.mkdir()
    with target.with_name("model.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process is downloading"):
            fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert target.read_bytes() == DATA


def test_a_lock_on_a_file_that_was_renamed_is_not_used(
    source: Counting, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes between our open and our lock: we must not write into its finished file."""
    target.parent.mkdir()
    partial, finished = target.with_name("model.partial"), target.with_name("finished")
    partial.write_bytes(b"theirs")
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if partial.exists() and not finished.exists():
            partial.rename(finished)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert finished.read_bytes() == b"theirs"
    assert target.read_bytes() == DATA


def test_a_target_that_cannot_be_written(source: Counting, target: Path) -> None:
    target.parent.write_bytes(b"a file where a directory is needed")
    with pytest.raises((RequestError, StorageError), match=r"fetch to .*model\.partial: "):
        fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)


def test_no_descriptor_is_left_open(source: Counting, target: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for digest in (DIGEST, "0" * 64):
        try:
            fetch(source, "a/model", target, size=len(DATA), sha256=digest)
        except IntegrityError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("link", ["model", "model.partial"])
def test_a_link_out_of_the_destination_is_refused_and_its_victim_stays(
    source: Counting, tmp_path: Path, target: Path, link: str
) -> None:
    target.parent.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (target.parent / link).symlink_to(victim)
    with pytest.raises(RequestError, match="a link out of"):
        fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
    assert victim.read_bytes() == b"mine"


def test_a_directory_that_leads_out_of_the_destination_is_refused(source: Counting, tmp_path: Path) -> None:
    (tmp_path / "pulled").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pulled" / "report").symlink_to(tmp_path / "elsewhere")
    path = tmp_path / "pulled" / "report" / "model"
    with pytest.raises(RequestError, match="a link out of"):
        fetch(source, "a/model", path, size=len(DATA), sha256=DIGEST, root=tmp_path / "pulled")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_pipe_where_the_partial_file_should_be_is_refused(source: Counting, target: Path) -> None:
    target.parent.mkdir()
    os.mkfifo(target.with_name("model.partial"))
    with pytest.raises(RequestError, match="a named pipe: expected a regular file"):
        fetch(source, "a/model", target, size=len(DATA), sha256=DIGEST)
