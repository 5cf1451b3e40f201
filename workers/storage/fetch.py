"""Downloads one object to a local file: in ranges side by side, resumably, every byte verified."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from counterweight.workers.errors import IntegrityError, RequestError, StorageError
from counterweight.workers.storage.regular import check_regular, confined

PARTIAL = ".partial"
"""Behind the name of a file that is not whole yet."""
PART = 8 << 20
"""Bytes of a range."""

RANGES = 8
"""That are asked for at once."""

_CHUNK = 4 << 20
_REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
)


class Source(Protocol):
    """What objects are downloaded from, as `ObjectStore` has these."""

    def uri_of(self, key: str) -> str: ...

    def size(self, key: str) -> int: ...

    def stream(self, key: str, *, start: int = 0) -> Iterator[bytes]: ...

    def read_range(self, key: str, start: int, length: int) -> bytes: ...


def fetch(store: Source, key: str, path: Path, *, size: int, sha256: str, root: Path | None = None) -> None:
    """Makes `path` hold the object of `size` bytes with digest `sha256` (hex); returns at once when it
    already does.

    root: the directory that `path` is to lie in, whatever links there are below it; None: the path's own.

    Bytes gather in `<path>.partial`, which a killed or failed download leaves behind and the next one
    continues. `path` appears whole, by a rename, after every byte was hashed, those of an earlier attempt
    included. A wrong digest discards the partial file; where bytes of an earlier attempt may be to blame,
    or a bit on the way, the download starts once more from nothing.

    Raises `IntegrityError` when size or digest differ, `ObjectNotFoundError` and `StorageError` as the
    store does, `StorageError` also when the disk is full or another process downloads to the same path, and
    `RequestError` when the path cannot be written, or a link leads out of `root`.
    """
    partial = path.with_name(path.name + PARTIAL)
    for each in (path, partial):
        confined(root or path.parent, each)
    with _failing(partial):
        if path.is_file() and path.stat().st_size == size and _hash_file(path) == sha256:
            return
        actual_size = store.size(key)
        if actual_size != size:
            raise IntegrityError(f"fetch {store.uri_of(key)}: the object has {actual_size} bytes, expected {size}")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_alone(partial)
        try:
            if _fill(store, key, descriptor, size) != sha256:
                os.ftruncate(descriptor, 0)
                actual = _fill(store, key, descriptor, size)
                if actual != sha256:
                    partial.unlink()
                    raise IntegrityError(f"fetch {store.uri_of(key)}: sha256 is {actual}, expected {sha256}, twice")
            os.fsync(descriptor)
            os.replace(partial, path)
        finally:
            os.close(descriptor)


def _fill(store: Source, key: str, descriptor: int, size: int) -> str:
    """Appends what is missing to the partial file; returns the sha256 of all of it."""
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, 0)
    digest = hashlib.sha256()
    position = 0
    while piece := os.pread(descriptor, _CHUNK, position):
        digest.update(piece)
        position += len(piece)
    # The store's own checksum may find a flipped bit first; with its bytes all here, ours tells the same.
    with contextlib.suppress(IntegrityError):
        for piece in _pieces(store, key, position, size):
            digest.update(piece)
            view = memoryview(piece)
            while view:
                written = os.pwrite(descriptor, view, position)
                view = view[written:]
                position += written
    return digest.hexdigest()


def _pieces(store: Source, key: str, start: int, size: int) -> Iterator[bytes]:
    """The bytes from `start` on, `RANGES` parts read ahead, in order: what was written before a break is a beginning."""
    if size - start <= PART:
        yield from store.stream(key, start=start) if start < size else ()
        return
    ahead: deque[Future[bytes]] = deque()
    threads = ThreadPoolExecutor(RANGES, "fetch")
    try:
        for first in range(start, size, PART):
            ahead.append(threads.submit(store.read_range, key, first, min(PART, size - first)))
            if len(ahead) == RANGES:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _open_alone(partial: Path) -> int:
    """Opens the partial file for this process alone: two that append to one file would spoil it for both."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o666)
        try:
            check_regular(partial, os.fstat(descriptor).st_mode)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise StorageError(f"fetch to {partial}: another process is downloading it") from error
        except FileNotFoundError:
            pass
        except RequestError:
            os.close(descriptor)
            raise
        # Between our open and our lock its owner finished and renamed it: what we hold is the finished file.
        os.close(descriptor)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _failing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"fetch to {path}: {error.strerror or error}"
        raise (RequestError(text) if error.errno in _REFUSED else StorageError(text)) from error
