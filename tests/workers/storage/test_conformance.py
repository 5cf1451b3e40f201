"""What every store promises, asked of each kind: a directory, moto, Ceph."""

from __future__ import annotations

import pickle
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from counterweight.workers.errors import IntegrityError, ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage import ObjectStore, StaleWrite, open_store, sha256_hex, split_uri
from counterweight.workers.storage.traffic import METER, Traffic
from tests.patience import PATIENCE

MIB = 1 << 20
SECOND = timedelta(seconds=1)


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [item.key for item in store.list(prefix)]


def sizes(store: ObjectStore, prefix: str = "") -> list[tuple[str, int]]:
    return [(item.key, item.size) for item in store.list(prefix)]


def modified(store: ObjectStore, key: str) -> datetime:
    (found,) = [item.modified for item in store.list(key) if item.key == key]
    return found


@pytest.mark.parametrize("size", [0, 1, 5 * MIB + 3])
def test_what_is_written_is_read(store: ObjectStore, size: int) -> None:
    data = random.Random(size).randbytes(size)
    store.write("a/b.bin", data)
    assert store.read("a/b.bin") == data
    assert store.read("a/b.bin", sha256=sha256_hex(data)) == data
    assert b"".join(store.stream("a/b.bin", chunk=MIB)) == data
    assert store.size("a/b.bin") == size
    assert store.exists("a/b.bin")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_write_takes_any_buffer(store: ObjectStore, kind: Callable[[bytes], bytes]) -> None:
    store.write("a", kind(b"data"))
    assert store.read("a") == b"data"


def test_write_replaces(store: ObjectStore) -> None:
    store.write("a", b"a longer first object")
    store.write("a", b"second")
    assert store.read("a") == b"second"


def test_a_wrong_digest_is_an_integrity_error(store: ObjectStore) -> None:
    store.write("a", b"data")
    with pytest.raises(IntegrityError, match=f"{sha256_hex(b'data')}.*expected {sha256_hex(b'else')}"):
        store.read("a", sha256=sha256_hex(b"else"))


@pytest.mark.parametrize("key", ["absent", "held/below", "hel"])
def test_an_absent_object(store: ObjectStore, key: str) -> None:
    store.write("held", b"data")
    assert not store.exists(key)
    uses: list[Callable[[], object]] = [
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.read_range(key, 0, 0),
        lambda: list(store.stream(key)),
        lambda: list(store.stream(key, start=1)),
        lambda: store.size(key),
        lambda: store.copy(key, "elsewhere"),
    ]
    for use in uses:
        with pytest.raises(ObjectNotFoundError, match=key):
            use()
    store.delete(key)
    assert keys(store) == ["held"]


def test_a_directory_is_no_object(store: ObjectStore) -> None:
    store.write("a/b", b"data")
    assert not store.exists("a")
    for use in (store.read, store.size):
        with pytest.raises(ObjectNotFoundError):
            use("a")
    store.delete("a")
    assert store.read("a/b") == b"data"


def test_bytes_that_pass_are_counted(store: ObjectStore) -> None:
    before = METER.now
    store.write("a", bytes(1000))
    assert store.create("b", bytes(30))
    with store.open_writer("c") as writer:
        writer.write(bytes(200))
        writer.commit()
    assert METER.now - before == Traffic(0, 1230)
    store.read("a")
    store.read_range("a", 10, 300)
    list(store.stream("a", start=900))
    assert METER.now - before == Traffic(1400, 1230)


def test_read_range_is_a_slice_of_read(store: ObjectStore) -> None:
    random_ = random.Random(0)
    data = random_.randbytes(10_000)
    store.write("a", data)
    spans = [(0, 0), (0, 1), (0, 10_000), (9_999, 1), (10_000, 0), (5_000, 5_000)]
    for _ in range(8):
        start = random_.randrange(10_000)
        spans.append((start, random_.randrange(10_000 - start)))
    for start, length in spans:
        assert store.read_range("a", start, length) == data[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (11, 1), (1 << 40, 1)])
def test_a_range_beyond_the_end_is_refused(store: ObjectStore, start: int, length: int) -> None:
    store.write("a", bytes(10))
    with pytest.raises(StorageError, match="/a: "):
        store.read_range("a", start, length)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1), (-1, 0)])
def test_a_negative_range_is_a_wrong_request(store: ObjectStore, start: int, length: int) -> None:
    store.write("a", bytes(10))
    with pytest.raises(RequestError, match="at least 0"):
        store.read_range("a", start, length)


def test_stream_begins_anywhere_up_to_the_end(store: ObjectStore) -> None:
    data = random.Random(1).randbytes(1_000)
    store.write("a", data)
    for start in (0, 1, 500, 999, 1_000):
        pieces = list(store.stream("a", start=start, chunk=64))
        assert b"".join(pieces) == data[start:]
        assert all(0 < len(piece) <= 64 for piece in pieces)
    with pytest.raises(StorageError, match="1001"):
        list(store.stream("a", start=1_001))


def test_create_once(store: ObjectStore) -> None:
    assert store.create("a/once", b"first")
    assert not store.create("a/once", b"second")
    assert not store.create("a/once", b"first")  # the same bytes do not make it ours
    assert store.read("a/once") == b"first"
    store.delete("a/once")
    assert store.create("a/once", b"third")
    assert store.read("a/once") == b"third"


def test_create_does_not_replace_what_was_written(store: ObjectStore) -> None:
    store.write("a", b"first")
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


def test_of_concurrent_creators_exactly_one_wins(store: ObjectStore) -> None:
    with ThreadPoolExecutor(16) as threads:
        for race in range(3):
            start = threading.Barrier(16)

            def enter(number: int, key: str = f"race/{race}", start: threading.Barrier = start) -> bool:
                start.wait()
                return store.create(key, b"%d" % number)

            won = [number for number, wins in enumerate(threads.map(enter, range(16))) if wins]
            assert len(won) == 1
            assert store.read(f"race/{race}") == b"%d" % won[0]
    assert len(keys(store)) == 3


@pytest.mark.parametrize("size", [0, 3, 5 * MIB, 11 * MIB + 1])
def test_writer(store: ObjectStore, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with store.open_writer("big") as writer:
        for start in range(0, size, 2 * MIB):
            writer.write(memoryview(data)[start : start + 2 * MIB])
        assert not store.exists("big")
        written = writer.commit()
    assert (written.size, written.sha256) == (size, sha256_hex(data))
    assert store.read("big") == data


def test_the_writer_counts_bytes_whatever_the_buffer_holds(store: ObjectStore) -> None:
    words = memoryview(bytearray(range(16))).cast("I")
    with store.open_writer("words") as writer:
        writer.write(words)
        assert writer.commit().size == 16
    assert store.read("words") == bytes(range(16))


def test_the_writers_buffer_may_be_reused(store: ObjectStore) -> None:
    buffer = bytearray(b"one")
    with store.open_writer("a") as writer:
        writer.write(buffer)
        buffer[:] = b"two"
        writer.write(buffer)
        writer.commit()
    assert store.read("a") == b"onetwo"


@pytest.mark.parametrize("size", [3, 11 * MIB])
@pytest.mark.parametrize("how", ["abort", "leave", "raise"])
def test_an_aborted_writer_leaves_nothing(store: ObjectStore, size: int, how: str) -> None:
    store.write("a", b"earlier")

    def fill() -> None:
        with store.open_writer("a") as writer:
            writer.write(bytes(size))
            if how == "abort":
                writer.abort()
                writer.abort()
            elif how == "raise":
                raise KeyError("the caller's own")

    if how == "raise":
        with pytest.raises(KeyError):
            fill()
    else:
        fill()
    assert store.read("a") == b"earlier"
    assert keys(store) == ["a"]
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 0


def test_a_closed_writer_refuses(store: ObjectStore) -> None:
    with store.open_writer("a") as writer:
        writer.write(b"x")
        writer.commit()
        for use in (writer.commit, lambda: writer.write(b"y")):
            with pytest.raises(ValueError, match="already committed or aborted"):
                use()
    assert store.read("a") == b"x"


def test_what_a_killed_writer_leaves_is_swept(store: ObjectStore) -> None:
    store.write("a", b"data")
    abandoned = store.open_writer("b")
    abandoned.write(bytes(6 * MIB))  # more than a part: an upload is open
    until_size(store, 5 * MIB)  # and nothing of it is under way
    assert keys(store) == ["a"]
    # Servers tell the beginning of an upload in whole seconds.
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 1
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 0
    with pytest.raises(StorageError):
        abandoned.commit()
    abandoned.abort()
    assert keys(store) == ["a"]
    assert store.read("a") == b"data"


def test_a_live_write_is_not_swept(store: ObjectStore, request: pytest.FixtureRequest) -> None:
    if "moto" in request.node.name:
        pytest.skip("moto dates every upload to 2010")
    with store.open_writer("a") as writer:
        writer.write(bytes(6 * MIB))
        assert store.abort_stale_writes(timedelta(hours=1)) == 0
        writer.commit()
    assert store.size("a") == 6 * MIB


def test_copy(store: ObjectStore) -> None:
    data = random.Random(2).randbytes(MIB)
    store.write("a", data)
    store.write("c/d", b"earlier")
    store.copy("a", "c/d")
    assert store.read("c/d") == data
    store.write("a", b"changed")
    assert store.read("c/d") == data
    store.copy("a", "a")
    assert store.read("a") == b"changed"


def test_list_is_in_key_order_with_sizes(store: ObjectStore) -> None:
    names = ["b", "a/b", "a-b", "a0", "a/c/d", "a/c-d", "ä", "a b+c%20.json", "Z", "…", "😀"]
    for size, name in enumerate(names):
        store.write(name, bytes(size))
    expected = sorted(((name, size) for size, name in enumerate(names)), key=lambda item: item[0].encode())
    assert sizes(store) == expected
    for prefix in ("a", "a/", "a/c", "a/c/", "a/c/d", "a/c/d/", "none", "none/", "b/"):
        assert sizes(store, prefix) == [item for item in expected if item[0].startswith(prefix)]
    for name in names:
        assert store.read(name) == bytes(names.index(name))


def test_objects_are_dated_by_the_stores_clock(store: ObjectStore) -> None:
    before = store.now()
    store.write("a", b"data")
    after = store.now()
    assert before - SECOND <= modified(store, "a") <= after + SECOND
    assert keys(store) == ["a"]


def test_a_touched_object_is_young_and_the_same(store: ObjectStore) -> None:
    data = random.Random(3).randbytes(MIB)
    store.write("a", data)
    written = modified(store, "a")
    time.sleep(1.1)  # servers date in whole seconds
    assert store.touch("a", timedelta(0))
    assert modified(store, "a") > written
    assert store.read("a") == data


def test_a_record_that_was_touched_is_still_its_creators(store: ObjectStore) -> None:
    assert store.create("a", b"first")
    time.sleep(1.1)
    assert store.touch("a", timedelta(0))
    assert not store.create("a", b"second")
    assert store.read("a") == b"first"


@pytest.mark.parametrize("key", ["absent", "held/below"])
def test_what_is_not_there_cannot_be_touched(store: ObjectStore, key: str) -> None:
    store.write("held", b"data")
    assert not store.touch(key, timedelta(0))
    assert keys(store) == ["held"]


def test_what_a_killed_writer_left_is_told_before_it_is_removed(store: ObjectStore) -> None:
    abandoned = store.open_writer("b")
    abandoned.write(bytes(6 * MIB))
    abandoned.write(bytes(5 * MIB))  # the first part is under way, and this one with it
    (stale,) = until_size(store, 10 * MIB)
    assert store.abort_write(stale)
    assert not store.abort_write(stale)
    assert list(store.stale_writes(timedelta(seconds=-60))) == []
    abandoned.abort()


def until_size(store: ObjectStore, size: int) -> list[StaleWrite]:
    """The unfinished writes, once they hold `size` bytes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = list(store.stale_writes(timedelta(seconds=-60)))
        if sum(stale.size for stale in found) >= size:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {size} bytes")


def test_delete(store: ObjectStore) -> None:
    store.write("a/b/c", b"1")
    store.write("a/d", b"2")
    store.delete("a/b/c")
    assert keys(store) == ["a/d"]
    assert not store.exists("a/b/c")
    store.delete("a/b/c")
    store.write("a/b", b"3")  # no trace of the directory
    assert keys(store) == ["a/b", "a/d"]


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", "a/", "./a", "a\\b", "a\0", "a\nb", "\ud800"])
def test_hostile_keys_are_refused_everywhere(store: ObjectStore, key: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: store.uri_of(key),
        lambda: store.below(key),
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 1),
        lambda: list(store.stream(key)),
        lambda: store.size(key),
        lambda: store.exists(key),
        lambda: store.write(key, b""),
        lambda: store.create(key, b""),
        lambda: store.open_writer(key),
        lambda: store.copy("a", key),
        lambda: store.copy(key, "a"),
        lambda: store.delete(key),
    ]
    for use in uses:
        with pytest.raises(RequestError, match="object key"):
            use()


@pytest.mark.parametrize("prefix", ["/", "../", "a//", "a\0", "a\\"])
def test_hostile_prefixes_are_refused(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(RequestError, match="object key"):
        list(store.list(prefix))


def test_a_store_travels_as_its_uri(store: ObjectStore) -> None:
    store.write("a", b"data")
    other: ObjectStore = pickle.loads(pickle.dumps(store))
    assert (type(other), other.uri) == (type(store), store.uri)
    assert other.read("a") == b"data"
    assert open_store(store.uri).read("a") == b"data"


def test_a_store_below_another(store: ObjectStore) -> None:
    inner = store.below("a/b")
    inner.write("c", b"data")
    assert inner.uri == store.uri_of("a/b")
    assert store.read("a/b/c") == b"data"
    assert keys(inner) == ["c"]
    assert keys(inner.below("d")) == []


def test_an_objects_uri_leads_back_to_it(store: ObjectStore) -> None:
    store.write("a/b c%20d.json", b"data")
    root, key = split_uri(store.uri_of("a/b c%20d.json"))
    assert open_store(root).read(key) == b"data"


def test_a_store_is_used_by_many_threads(store: ObjectStore) -> None:
    def use(number: int) -> bool:
        data = random.Random(number).randbytes(100_000)
        store.write(f"{number % 7}/{number}", data)
        return store.read(f"{number % 7}/{number}", sha256=sha256_hex(data)) == data

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(use, range(36)))
    assert len(keys(store)) == 36


def test_directories_may_vanish_and_come_back_under_concurrent_use(store: ObjectStore) -> None:
    def use(number: int) -> None:
        for turn in range(8):
            store.write(f"deep/er/{number}", b"%d" % turn)
            assert store.read(f"deep/er/{number}") == b"%d" % turn
            store.delete(f"deep/er/{number}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert keys(store) == []


def test_a_presigned_url_needs_no_credentials(store: ObjectStore) -> None:
    store.write("a b/c+d", b"data")
    url = store.presigned("a b/c+d", 60)
    if store.uri.startswith("file:"):
        assert url is None
    else:
        assert url is not None
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"data"
