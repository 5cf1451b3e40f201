"""Objects as files below a directory, with the guarantees of an object store.

Every object appears whole: it is written to a temporary file in the directory where it belongs (the same
file system, so that the last step is atomic), flushed to the disk, and then renamed (`write`,
`open_writer`, `copy`) or hard-linked (`create`, because a link fails where a rename would replace).
Directories are flushed too, or a power cut could take back the name of an object that was reported as
written.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from counterweight.workers.errors import ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage.base import STREAM_CHUNK, ObjectInfo, ObjectStore, StaleWrite, Writer
from counterweight.workers.storage.names import TEMPORARY_PREFIX, check_key, check_prefix, check_range, is_key
from counterweight.workers.storage.regular import check_regular, confined, open_regular
from counterweight.workers.storage.traffic import METER

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Trying again cannot help: missing rights, or a file system that cannot do what is asked.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.EOPNOTSUPP)
_MAX_REMOVALS = 10  # of one directory between making it and opening a file in it
_MOST_PER_CALL = 1 << 30  # Linux moves at most 2 GiB less a page in one call
# A key that is another key's directory, or the reverse.
_COLLISION = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)


class FileStore(ObjectStore):
    """Objects below a directory, which need not exist before the first write. Raises nothing on
    construction."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = root.as_uri()

    def __reduce__(self) -> tuple[type[FileStore], tuple[Path]]:
        return FileStore, (self._root,)

    def below(self, key: str) -> FileStore:
        return FileStore(self._path(key))

    def uri_of(self, key: str) -> str:
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        """Where the object lies or is to lie; RequestError when a linked directory leads out of the root."""
        path = self._root / check_key(key)
        confined(self._root, path, follow=False)
        return path

    def _open(self, path: Path, operation: str = "read") -> BinaryIO:
        """The object at `path`, for reading, unbuffered."""
        with _reading(path, operation):
            return os.fdopen(open_regular(confined(self._root, path)), "rb", buffering=0)

    def _read(self, key: str) -> bytes:
        return b"".join(self.stream(key, chunk=_MOST_PER_CALL))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        path = self._path(key)
        check_range(path.as_uri(), start, length)
        pieces = []
        with self._open(path) as file, _reading(path):
            size = os.fstat(file.fileno()).st_size
            if start + length > size:
                raise _beyond_end(path, start + length, size)
            position = start
            while position < start + length:
                piece = os.pread(file.fileno(), min(start + length - position, _MOST_PER_CALL), position)
                if not piece:
                    raise _shrunk(path, position)
                pieces.append(piece)
                position += len(piece)
        METER.read(length)
        return b"".join(pieces)  # the one piece itself, uncopied, but for the largest ranges

    def stream(self, key: str, *, start: int = 0, chunk: int = STREAM_CHUNK) -> Iterator[bytes]:
        path = self._path(key)
        check_range(path.as_uri(), start, 0)
        with self._open(path) as file:
            with _reading(path):
                size = os.fstat(file.fileno()).st_size
                file.seek(start)
            if start > size:
                raise _beyond_end(path, start, size)
            position = start
            while position < size:
                with _reading(path):
                    piece = file.read(min(chunk, size - position))
                if not piece:
                    raise _shrunk(path, position)
                position += len(piece)
                METER.read(len(piece))
                yield piece

    def size(self, key: str) -> int:
        path = self._path(key)
        with _reading(path):
            found = confined(self._root, path).stat()
            check_regular(path, found.st_mode)
            return found.st_size

    def exists(self, key: str) -> bool:
        path = self._path(key)
        try:
            with _reading(path, "look up"):
                check_regular(path, confined(self._root, path).stat().st_mode)
        except ObjectNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes | bytearray | memoryview) -> None:
        with self.open_writer(key) as writer:
            writer.write(data)
            writer.commit()

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _failing("create", path), _Temporary(path) as temporary:
            temporary.write(memoryview(data))
            METER.wrote(len(data))
            temporary.flush()
            try:
                os.link(temporary.path, path)
            except FileExistsError:
                # NFS repeats a request whose answer was lost, and the repetition meets our own link.
                won = os.stat(temporary.path).st_nlink == 2
                if not won and path.is_dir():
                    raise
            else:
                won = True
            if won:
                _flush_directory(path.parent)
            return won

    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Writer:
        return _FileWriter(self._path(key), durable, sha256)

    def copy(self, source_key: str, key: str) -> None:
        source, path = self._path(source_key), self._path(key)
        with self._open(source, "copy") as origin, _failing("copy to", path), _Temporary(path) as temporary:
            with open(temporary.descriptor, "wb", closefd=False) as target:
                shutil.copyfileobj(origin, target, STREAM_CHUNK)
            temporary.publish()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        directory = check_prefix(prefix).rpartition("/")[0]
        yield from self._walk(directory, prefix)

    def _walk(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        path = self._root / directory
        try:
            with os.scandir(path) as found:
                entries = [(f"{directory}/{entry.name}" if directory else entry.name, entry) for entry in found]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _translated("list", path, error) from error
        named = [(key, entry, entry.is_dir(follow_symlinks=False)) for key, entry in entries if is_key(key)]
        # A directory takes part in the order with its slash, or 'a/b' would come before 'a-b'.
        for key, entry, is_directory in sorted(named, key=lambda item: item[0] + "/" * item[2]):
            if is_directory:
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                try:
                    if entry.is_file():
                        stat = entry.stat()
                        yield ObjectInfo(key=key, size=stat.st_size, modified=_time(stat))
                except FileNotFoundError:
                    continue  # deleted since the directory was read: no longer an object
                except OSError as error:
                    raise _translated("list", path / entry.name, error) from error

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _failing("delete", path):
            try:
                path.unlink()
                self._remove_empty(path.parent)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return  # nothing there, or another delete removed the directory first

    def _remove_empty(self, directory: Path) -> None:
        """Removes the directories that the last object of a prefix leaves empty: in an object store there
        are none."""
        while directory != self._root:
            try:
                directory.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                break
            directory = directory.parent
        _flush_directory(directory)

    def now(self) -> datetime:
        with _failing("ask the time of", self._root), _Temporary(self._root / "now") as temporary:
            return _time(os.fstat(temporary.descriptor))

    def touch(self, key: str, older_than: timedelta) -> bool:
        # At the same cost for any age, and by the file server's own clock.
        path = self._path(key)
        with _failing("touch", path):
            try:
                os.utime(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            except PermissionError:  # another user's file: whoever may write in its directory may replace it
                self.copy(key, key)
        return True

    def stale_writes(self, older_than: timedelta) -> Iterator[StaleWrite]:
        with _failing("look for stale writes below", self._root):
            if not self._root.is_dir():
                return
        limit = self.now() - older_than
        for directory, _, names in os.walk(self._root, onerror=_unreadable):
            for name in names:
                path = Path(directory, name)
                if name.startswith(TEMPORARY_PREFIX):
                    with _failing("look at stale", path):
                        try:
                            found = path.stat()
                        except FileNotFoundError:
                            continue  # its writer finished or another sweep was first
                    if _time(found) < limit:
                        yield StaleWrite(key=path.relative_to(self._root).as_posix(), size=found.st_size)

    def abort_write(self, stale: StaleWrite) -> bool:
        path = self._root / stale.key
        with _failing("remove stale", path):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
        return True


class _Temporary:
    """A file beside the one it is to become; leaving the block removes whatever was not published."""

    def __init__(self, path: Path) -> None:
        self._target = path
        self.path = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        self.descriptor = self._open()
        self._published = False

    def _open(self) -> int:
        for remaining in reversed(range(_MAX_REMOVALS)):
            try:
                _make_directory(self.path.parent)
                # Not tempfile: its files are readable by their owner alone, and an artifact is to be shared.
                return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # a delete removed the directory while it was still empty
                if not remaining:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def write(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self.descriptor, view) :]

    def flush(self) -> None:
        os.fsync(self.descriptor)

    def publish(self, *, durable: bool = True) -> None:
        if durable:
            self.flush()
        os.replace(self.path, self._target)
        self._published = True
        if durable:
            _flush_directory(self._target.parent)

    def close(self) -> None:
        try:
            os.close(self.descriptor)
        finally:
            if not self._published:
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> _Temporary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _FileWriter(Writer):
    def __init__(self, path: Path, durable: bool, sha256: str | None) -> None:
        super().__init__(path.as_uri(), sha256)
        self._path, self._durable = path, durable
        with _failing("write", path):
            self._temporary = _Temporary(path)

    def _append(self, view: memoryview) -> None:
        with _failing("write", self._path):
            self._temporary.write(view)

    def _publish(self) -> None:
        with _failing("write", self._path):
            self._temporary.publish(durable=self._durable)
            self._temporary.close()

    def _discard(self) -> None:
        with _failing("abort writing", self._path):
            self._temporary.close()


def _time(found: os.stat_result) -> datetime:
    return datetime.fromtimestamp(found.st_mtime, UTC)


def _make_directory(path: Path) -> None:
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        try:
            directory.mkdir()
        except FileExistsError:
            if not directory.is_dir():
                raise
        else:
            _flush_directory(directory.parent)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(error: OSError) -> None:
    if error.errno not in _ABSENT:
        raise _translated("list", Path(error.filename), error) from error


def _reading(path: Path, operation: str = "read") -> AbstractContextManager[None]:
    return _failing(operation, path, absent=True)


@contextmanager
def _failing(operation: str, path: Path, *, absent: bool = False) -> Iterator[None]:
    """Turns an `OSError` of the block into the error class that says what to do about it."""
    try:
        yield
    except OSError as error:
        if absent and error.errno in _ABSENT:
            raise ObjectNotFoundError(f"{operation} {path.as_uri()}: no such object") from error
        raise _translated(operation, path, error) from error


def _translated(operation: str, path: Path, error: OSError) -> RequestError | StorageError:
    number = error.errno or 0
    cause = f"{operation} {path.as_uri()}: {os.strerror(number) if number else error}"
    if number:
        cause += f" ({errno.errorcode.get(number, number)})"
    if number in _COLLISION:
        return RequestError(f"{cause}: no key may be a directory of another key")
    return RequestError(cause) if number in _REFUSED else StorageError(cause)


def _beyond_end(path: Path, end: int, size: int) -> StorageError:
    return StorageError(f"read {path.as_uri()}: up to byte {end}, but the object has {size} bytes")


def _shrunk(path: Path, position: int) -> StorageError:
    return StorageError(f"read {path.as_uri()}: ended at byte {position}: the file shrank while it was read")
