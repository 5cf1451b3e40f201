"""What workers of one machine read of a remote store, counted by the meter of bytes. A directory stands for the store."""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counterweight.workers.storage import node_cache
from counterweight.workers.storage.file import FileStore
from counterweight.workers.storage.node_cache import NodeCache
from counterweight.workers.storage.traffic import METER

DATA = bytes(range(256)) * 64
PIECE = 1024
RANGES = [(start, PIECE) for start in range(0, len(DATA), PIECE)]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = FileStore(tmp_path / "store")
    store.write("object", DATA)
    store.uri = "s3://bucket/prefix"
    return store


def read_all(cache: NodeCache) -> bytes:
    return b"".join(cache.read_range("object", *one) for one in RANGES)


def folders() -> list[Path]:
    root = node_cache._root()
    return list(root.iterdir()) if root.exists() else []


def test_workers_side_by_side_read_an_object_once(remote: FileStore) -> None:
    with ThreadPoolExecutor(4) as pool, NodeCache(remote, "a") as one, NodeCache(remote, "a") as other:
        before = METER.now.read
        assert set(pool.map(read_all, [one, other, one, other])) == {DATA}
        assert METER.now.read - before == len(DATA)
        with NodeCache(remote, "b") as content:
            assert read_all(content) == DATA
        assert METER.now.read - before == 2 * len(DATA)
    assert not folders()


def test_a_file_is_read_as_it_is(remote: FileStore, tmp_path: Path) -> None:
    remote.uri = (tmp_path / "store").as_uri()
    with NodeCache(remote, "a") as cache:
        assert read_all(cache) == DATA
        assert not folders()


def test_the_oldest_ranges_are_dropped(remote: FileStore) -> None:
    with NodeCache(remote, "a", limit=3 * PIECE) as cache:
        assert read_all(cache) == DATA
        (folder,) = folders()
        assert sum(path.stat().st_size for path in folder.iterdir()) == 3 * PIECE
        before = METER.now.read
        cache.read_range("object", *RANGES[-1])
        assert METER.now.read == before
        assert cache.read_range("object", *RANGES[0]) == DATA[:PIECE]
        assert METER.now.read == before + PIECE


def test_what_dead_workers_left_is_removed_and_what_is_in_use_stays(remote: FileStore) -> None:
    with NodeCache(remote, "alive") as alive:
        read_all(alive)
        dead = node_cache._root() / "dead"
        dead.mkdir()
        (dead / node_cache._USERS).touch()
        (dead / "range").write_bytes(DATA)
        with NodeCache(remote, "next"):
            assert dead not in folders()
        before = METER.now.read
        assert read_all(alive) == DATA
        assert METER.now.read == before


def test_a_range_that_was_cut_off_is_read_again(remote: FileStore) -> None:
    with NodeCache(remote, "a") as cache:
        cache.read_range("object", *RANGES[0])
        (path,) = (path for path in folders()[0].iterdir() if path.name != node_cache._USERS)
        path.write_bytes(DATA[:10])
        assert cache.read_range("object", *RANGES[0]) == DATA[:PIECE]


@pytest.mark.parametrize("link", [True, False])
def test_a_folder_of_somebody_else_is_not_used(remote: FileStore, tmp_path: Path, link: bool) -> None:
    (tmp_path / "theirs").mkdir()
    if link:
        node_cache._root().symlink_to(tmp_path / "theirs")
    else:
        node_cache._root().mkdir()
        node_cache._root().chmod(0o777)
    with NodeCache(remote, "a") as cache:
        assert read_all(cache) == DATA
        assert not folders()


def test_where_nothing_can_be_written_every_worker_reads_for_itself(
    remote: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no folder").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no folder"))
    with NodeCache(remote, "a") as cache:
        assert read_all(cache) == DATA


def test_a_folder_that_goes_while_it_is_used_costs_reads_alone(remote: FileStore) -> None:
    with NodeCache(remote, "a") as cache:
        cache.read_range("object", *RANGES[0])
        (folder,) = folders()
        shutil.rmtree(folder)
        assert read_all(cache) == DATA
