"""The probe passes stores that keep their promises, and refuses each kind that does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterweight.workers.errors import RequestError, StorageError
from counterweight.workers.storage import ObjectInfo, ObjectStore, open_store, probe
from counterweight.workers.storage.file import FileStore
from tests.patience import PATIENCE, cpu_seconds
from tests.servers import Connect, S3Server


def test_a_good_store_passes_quickly_and_is_left_clean(store: ObjectStore) -> None:
    store.write("held", b"data")
    assert cpu_seconds(lambda: probe(store), below=5) < 5
    assert [item.key for item in store.list()] == ["held"]


def test_a_directory_is_left_clean_of_directories(tmp_path: Path) -> None:
    probe(FileStore(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_swift_is_refused(swift: S3Server, connect: Connect) -> None:
    store = open_store(connect(swift))
    with pytest.raises(RequestError, match=r"^refused: s3://.* of 8 concurrent creators .* told that they won"):
        probe(store)
    assert list(store.list()) == []


class Overwrites(FileStore):
    """Ignores the condition, as several servers do."""

    def create(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


class LooksFirst(FileStore):
    """Looks, and writes afterwards: of a race, when a second one has looked."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._lock, self._looked, self._second = threading.Lock(), 0, threading.Event()

    def create(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        if "race" in key:
            with self._lock:
                self._looked += 1
                if self._looked == 2:
                    self._second.set()
            assert self._second.wait(PATIENCE)
        self.write(key, data)
        return True


class RefusesAndWrites(FileStore):
    def create(self, key: str, data: bytes) -> bool:
        taken = self.exists(key)
        self.write(key, data)
        return not taken


class LosersWrite(FileStore):
    """Tells the truth about who won, and lets a loser write."""

    def create(self, key: str, data: bytes) -> bool:
        won = super().create(key, data)
        if not won and "race" in key:
            self.write(key, data)
        return won


class NeverCreates(FileStore):
    def create(self, key: str, data: bytes) -> bool:
        return False


class ReadsStale(FileStore):
    """Answers with the first version that it has read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._seen: dict[str, bytes] = {}

    def _read(self, key: str) -> bytes:
        return self._seen.setdefault(key, super()._read(key))


class ListsLate(FileStore):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(list(super().list(prefix))[:-1])


class ListsUnsorted(FileStore):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(list(super().list(prefix))[::-1])


class ListsDeleted(FileStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._first: list[ObjectInfo] = []

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._first = self._first or list(super().list(prefix))
        return iter(self._first)


class NeverDeletes(FileStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._listings = 0

    def delete(self, key: str) -> None:
        pass

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        listed = list(super().list(prefix))
        self._listings += 1
        return iter(listed if self._listings == 1 else [])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Overwrites, "succeeded twice"),
        (LooksFirst, "of 8 concurrent creators"),
        (RefusesAndWrites, "replaced the object"),
        (LosersWrite, "what the winner of a race wrote"),
        (NeverCreates, "fresh key"),
        (ReadsStale, "a read after a write"),
        (ListsLate, "did not show them in order"),
        (ListsUnsorted, "did not show them in order"),
        (ListsDeleted, "showed a deleted object"),
        (NeverDeletes, "a deleted object could still be read"),
    ],
)
def test_weak_stores_are_refused(tmp_path: Path, kind: type[FileStore], why: str) -> None:
    with pytest.raises(RequestError, match=f"^refused: file:///.*{why}"):
        probe(kind(tmp_path))


class Unreachable(FileStore):
    def create(self, key: str, data: bytes) -> bool:
        raise StorageError("create: the first failure")

    def delete(self, key: str) -> None:
        raise StorageError("delete: the second failure")


def test_an_unreachable_store_is_no_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the first failure"):
        probe(Unreachable(tmp_path))
