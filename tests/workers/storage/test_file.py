"""What is particular to a directory: links, permissions, full disks, crashes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event
from time import sleep
from types import SimpleNamespace

import pytest

from counterweight.workers.errors import CounterweightError, ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage import file, open_named, open_store, sha256_hex, stream_sha256
from counterweight.workers.storage.base import HASHED_BESIDE
from counterweight.workers.storage.file import FileStore
from tests.patience import PATIENCE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> FileStore:
    return FileStore(root)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_root_that_does_not_exist_is_an_empty_store(store: FileStore, root: Path) -> None:
    assert list(store.list()) == []
    assert not store.exists("a")
    assert store.abort_stale_writes(timedelta(0)) == 0
    store.delete("a")
    assert not root.exists()


def test_other_users_may_read_what_the_umask_lets_them(store: FileStore, root: Path) -> None:
    umask = os.umask(0o022)
    try:
        store.write("a", b"data")
        store.create("b", b"data")
        store.copy("a", "c")
    finally:
        os.umask(umask)
    assert [(root / name).stat().st_mode & 0o777 for name in "abc"] == [0o644] * 3


def test_files_being_written_are_neither_listed_nor_objects(store: FileStore, root: Path) -> None:
    with store.open_writer("a/b") as writer:
        writer.write(b"data")
        (temporary,) = files(root)
        assert temporary.startswith("a/.counterweight-tmp-")
        assert list(store.list()) == []
        with pytest.raises(RequestError, match="being written"):
            store.exists(temporary)
    assert files(root) == []


def test_no_operation_leaves_a_temporary_file(store: FileStore, root: Path) -> None:
    store.write("a", b"1")
    store.create("b", b"2")
    store.create("b", b"3")
    store.copy("a", "c")
    with pytest.raises(ObjectNotFoundError):
        store.copy("absent", "d")
    assert files(root) == ["a", "b", "c"]


def test_linked_files_are_objects(store: FileStore, root: Path, tmp_path: Path) -> None:
    root.mkdir()
    (root / "blob").write_bytes(b"weights")
    (tmp_path / "elsewhere").mkdir()
    (root / "model").symlink_to("blob")
    (root / "broken").symlink_to(root / "gone")
    (root / "directory").symlink_to(tmp_path / "elsewhere")
    (root / "cycle").symlink_to(root)
    assert [(item.key, item.size) for item in store.list()] == [("blob", 7), ("model", 7)]
    assert store.read("model") == b"weights"
    store.write("model", b"other")
    assert (root / "blob").read_bytes() == b"weights"
    store.delete("broken")
    assert not (root / "broken").is_symlink()


def test_a_snapshot_of_the_hubs_cache_reads_its_blobs_and_nothing_else(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    for folder in (repository / "blobs", repository / "refs", snapshot / "deep"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "abc").write_bytes(b"weights")
    (repository / "refs" / "main").write_bytes(b"0123")
    (snapshot / "model").symlink_to("../../blobs/abc")
    (snapshot / "deep" / "model").symlink_to("../../../blobs/abc")
    (snapshot / "refs").symlink_to("../../refs/main")
    store = FileStore(snapshot)
    assert store.read("model") == store.read("deep/model") == b"weights"
    assert store.size("model") == 7
    with pytest.raises(RequestError, match="a link out of"):
        store.read("refs")


READS: dict[str, Callable[[FileStore, str], object]] = {
    "read": FileStore.read,
    "read_bounded": lambda store, key: store.read_bounded(key, 100),
    "read_range": lambda store, key: store.read_range(key, 0, 1),
    "stream": lambda store, key: list(store.stream(key)),
    "size": FileStore.size,
    "exists": FileStore.exists,
    "copy": lambda store, key: store.copy(key, "copy"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_link_out_of_the_root_is_refused(
    store: FileStore, root: Path, tmp_path: Path, read: Callable[[FileStore, str], object]
) -> None:
    (tmp_path / "secret").write_bytes(b"topsecret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "secret").write_bytes(b"topsecret")
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path / "folder")
    for key in ("link", "folder/secret"):
        with pytest.raises(RequestError, match=r"a link out of .*expected a file of that folder"):
            read(store, key)
    with pytest.raises(RequestError, match="a link out of"):
        store.write("folder/new", b"1")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["secret"]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_no_regular_file_is_refused_at_once(
    store: FileStore, root: Path, read: Callable[[FileStore, str], object]
) -> None:
    root.mkdir()
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "socket"))  # a socket's path has at most 107 bytes
        for key, kind in (("pipe", "a named pipe"), ("socket", "a socket")):
            with pytest.raises(RequestError, match=f"{kind}.*: expected a regular file"):
                read(store, key)
    with pytest.raises(RequestError, match="a device: expected a regular file"):
        read(FileStore(Path("/dev")), "zero")


def test_an_object_named_by_a_link_is_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "text").write_bytes(b"words")
    (tmp_path / "link").symlink_to("far/text")
    named, key = open_named((tmp_path / "link").as_uri())
    assert named.read(key) == b"words"


def test_a_bounded_read_looks_at_the_size_first(store: FileStore, root: Path) -> None:
    store.write("a", b"12345")
    assert store.read_bounded("a", 5) == b"12345"
    with (root / "a").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(RequestError, match=f"{1 << 40} bytes, expected at most 5"):
        store.read_bounded("a", 5)


def test_names_that_are_no_keys_are_not_listed(store: FileStore, root: Path) -> None:
    store.write("a", b"1")
    for name in (b"back\\slash", b"new\nline", b"not-utf8-\xff", b".counterweight-tmp-0"):
        Path(os.fsdecode(bytes(root) + b"/" + name)).write_bytes(b"2")
    os.mkfifo(root / "pipe")
    assert [(item.key, item.size) for item in store.list()] == [("a", 1)]


def test_delete_takes_empty_directories_along_but_not_the_root(store: FileStore, root: Path) -> None:
    store.write("a/b/c/d", b"1")
    store.write("a/e", b"2")
    store.delete("a/b/c/d")
    assert [path.name for path in (root / "a").iterdir()] == ["e"]
    store.delete("a/e")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("operation", ["write", "create", "copy"])
@pytest.mark.parametrize("key", ["a", "file/below"])
def test_a_key_that_is_anothers_directory_is_refused(store: FileStore, root: Path, operation: str, key: str) -> None:
    store.write("a/b", b"1")
    store.write("file", b"2")
    operations: dict[str, Callable[[], object]] = {
        "write": lambda: store.write(key, b"3"),
        "create": lambda: store.create(key, b"3"),
        "copy": lambda: store.copy("file", key),
    }
    with pytest.raises(RequestError, match="no key may be a directory of another key"):
        operations[operation]()
    assert files(root) == ["a/b", "file"]


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, StorageError, r"write file:///.*/a: No space left on device \(ENOSPC\)"),
        (errno.EIO, StorageError, r"EIO"),
        (errno.EDQUOT, StorageError, r"EDQUOT"),
        (errno.EACCES, RequestError, r"Permission denied \(EACCES\)"),
        (errno.EROFS, RequestError, r"EROFS"),
    ],
)
def test_what_the_system_refuses_is_told_in_one_line(
    store: FileStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    text: str,
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    store.write("a", b"earlier")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CounterweightError, match=text) as caught:
        store.write("a", b"data")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    with pytest.raises(kind, match=r"create file:///.*/b: "):
        store.create("b", b"data")
    assert files(root) == ["a"]
    assert store.read("a") == b"earlier"


def test_a_disk_that_fills_up_while_writing(store: FileStore, root: Path) -> None:
    # The kernel refuses to let files grow beyond a limit, as it refuses when the disk is full.
    program = f"""
import resource, signal
from counterweight.workers.errors import StorageError
from counterweight.workers.storage import open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = open_store({store.uri!r})
store.write("small", bytes(1000))
for attempt in (lambda: store.write("big", bytes(2 << 20)), lambda: store.create("big", bytes(2 << 20))):
    try:
        attempt()
    except StorageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert [line.split(" (")[1] for line in done.stdout.splitlines()] == ["EFBIG)", "EFBIG)"]
    assert files(root) == ["small"]


def test_a_killed_writer_leaves_nothing_visible(store: FileStore, root: Path) -> None:
    program = f"""
import sys, time
from counterweight.workers.storage import open_store
store = open_store({store.uri!r})
writer = store.open_writer("a/big")
writer.write(bytes(1 << 20))
print("written", flush=True)
time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert list(store.list()) == []
    assert not store.exists("a/big")
    (left,) = files(root)
    assert store.abort_stale_writes(timedelta(hours=1)) == 0
    os.utime(root / left, (time.time() - 7200,) * 2)
    store.write("old", b"data")
    os.utime(root / "old", (time.time() - 7200,) * 2)
    assert store.abort_stale_writes(timedelta(hours=1)) == 1
    assert files(root) == ["old"]


def test_another_users_file_is_touched_by_replacing_it(
    store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", b"data")
    os.utime(root / "a", (time.time() - 7200,) * 2)

    def refuses(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "utime", refuses)
    assert store.touch("a", timedelta(0))
    assert time.time() - (root / "a").stat().st_mtime < 3600
    assert store.read("a") == b"data"
    assert files(root) == ["a"]


def test_a_link_whose_answer_was_lost_is_won(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(source: str, target: str) -> None:
        link(source, target)
        link(source, target)  # as NFS does when it heard no answer

    monkeypatch.setattr(os, "link", repeated)
    assert store.create("a", b"mine")
    assert not store.create("a", b"other")
    assert store.read("a") == b"mine"


class FlipsOnce(FileStore):
    """The first read of anything is wrong in one bit."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads = 0

    def _read(self, key: str) -> bytes:
        self.reads += 1
        data = super()._read(key)
        return data if self.reads > 1 else bytes([data[0] ^ 1]) + data[1:]


def test_a_wrong_bit_is_read_again_where_a_digest_tells(root: Path) -> None:
    store = FlipsOnce(root)
    store.write("a", b"data")
    assert store.read("a", sha256=sha256_hex(b"data")) == b"data"
    assert store.reads == 2
    assert store.read("a", sha256=sha256_hex(b"data")) == b"data"
    assert store.reads == 3


def test_a_directory_that_a_delete_takes_away_is_made_again(
    store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_directory = file._make_directory
    removed: list[Path] = []

    def make_and_lose_once(path: Path) -> None:
        make_directory(path)
        if not removed:
            path.rmdir()
            removed.append(path)

    monkeypatch.setattr(file, "_make_directory", make_and_lose_once)
    store.write("a/b", b"data")
    assert removed == [root / "a"]
    assert store.read("a/b") == b"data"


def test_a_file_that_shrinks_while_it_is_read(store: FileStore, root: Path) -> None:
    store.write("a", bytes(100))
    stream = store.stream("a", chunk=10)
    assert len(next(stream)) == 10
    os.truncate(root / "a", 20)
    with pytest.raises(StorageError, match="ended at byte 20"):
        list(stream)


def test_an_object_replaced_while_it_is_streamed_is_not_mixed(store: FileStore) -> None:
    store.write("a", b"old" * 100)
    stream = store.stream("a", chunk=10)
    head = next(stream)
    store.write("a", b"new" * 100)
    assert head + b"".join(stream) == b"old" * 100


def test_file_users_do_not_pay_for_boto3(tmp_path: Path) -> None:
    program = f"""
import sys
from counterweight.workers.storage import open_store, probe
store = open_store({tmp_path.as_uri()!r})
probe(store)
assert "boto3" not in sys.modules and "botocore" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


def test_opening_touches_nothing(root: Path) -> None:
    open_store(root.as_uri())
    assert not root.exists()


@pytest.mark.parametrize(("durable", "flushed"), [(True, True), (False, False)])
def test_only_durable_writes_wait_for_the_disk(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, durable: bool, flushed: bool
) -> None:
    store.write("before", b"")  # makes the directory, which is flushed in any case
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with store.open_writer("a", durable=durable) as writer:
        writer.write(b"bytes")
        writer.commit()
    assert bool(synced) is flushed
    assert store.read("a") == b"bytes"


def test_a_piece_is_hashed_while_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, expected = Event(), sha256_hex(b"onetwo")
    (tmp_path / "a").write_bytes(b"onetwo")
    store = FileStore(tmp_path)

    def pieces(key: str) -> Iterator[bytes]:
        yield b"one"
        asked.set()
        yield b"two"

    class Late:
        """Takes in the first piece when the second is asked for, and not before."""

        def __init__(self) -> None:
            self._own = hashlib.sha256()

        def update(self, piece: bytes) -> None:
            assert asked.wait(PATIENCE), "the second piece waits for the first"
            self._own.update(piece)

        def hexdigest(self) -> str:
            return self._own.hexdigest()

    monkeypatch.setattr(store, "stream", pieces)
    monkeypatch.setattr("counterweight.workers.storage.base.hashlib", SimpleNamespace(sha256=Late))
    assert stream_sha256(store, "a") == expected


def test_a_large_piece_is_hashed_while_it_is_written(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written, data = Event(), bytes(HASHED_BESIDE)
    expected = sha256_hex(data)

    class Late:
        """Takes in the piece when it is written, and not before."""

        def __init__(self) -> None:
            self._own = hashlib.sha256()

        def update(self, piece: bytes) -> None:
            assert written.wait(PATIENCE), "the piece is written behind its hashing"
            self._own.update(piece)

        def hexdigest(self) -> str:
            return self._own.hexdigest()

    monkeypatch.setattr("counterweight.workers.storage.base.hashlib", SimpleNamespace(sha256=Late))
    with store.open_writer("a") as writer:
        append = writer._append

        def told(view: memoryview) -> None:
            append(view)
            written.set()

        monkeypatch.setattr(writer, "_append", told)
        writer.write(data)
        assert writer.commit().sha256 == expected
    assert store.read("a") == data


def test_a_piece_that_cannot_be_written_is_not_hashed_any_more_when_its_owner_takes_it_back(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_in: list[bytes] = []

    class Slow:
        def __init__(self) -> None:
            self._own = hashlib.sha256()

        def update(self, piece: bytes) -> None:
            sleep(0.05)
            taken_in.append(bytes(piece[:1]))

    monkeypatch.setattr("counterweight.workers.storage.base.hashlib", SimpleNamespace(sha256=Slow))
    with store.open_writer("a") as writer:

        def full(view: memoryview) -> None:
            raise StorageError("full")

        monkeypatch.setattr(writer, "_append", full)
        with pytest.raises(StorageError, match="full"):
            writer.write(bytearray(HASHED_BESIDE))
        assert taken_in == [b"\0"]
