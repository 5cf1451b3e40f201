"""One narrow interface over object storage.

A store is bound to a root URI (`file:///directory` or `s3://bucket/prefix`); everything below the root is
addressed by a key, a relative POSIX path. Both kinds behave the same wherever the interface speaks; where a
difference cannot be hidden, the docstring says so. What keys and URIs may look like is in
`workers.storage.names`.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from counterweight.workers.errors import IntegrityError, RequestError, StorageError
from counterweight.workers.storage.traffic import METER

# Large enough that per-chunk Python work vanishes beside the network, small enough to hold dozens of them.
STREAM_CHUNK = 4 << 20

HASHED_BESIDE = 1 << 20
"""Bytes of a write from which a thread hashes them while they are written: a millisecond's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One listed object: its key, relative to the store's root, its size in bytes, and when it was written, by the
    clock of the store (`ObjectStore.now`)."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleWrite:
    """A write that was begun and not ended: `key` as it is named in the store, the bytes that it holds, and on `s3:` the
    id of its upload."""

    key: str
    size: int
    upload: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a `Writer` committed: size in bytes, and the sha256 (hex) of every byte as it was handed over, or as the caller knew
    it."""

    size: int
    sha256: str


class Writer(abc.ABC):
    """Writes one object piece by piece in bounded memory; nothing is visible before `commit`.

    A context manager: leaving the block without a commit (by an exception or not) aborts, and an abort
    leaves neither a temporary file nor an open multipart upload behind. Not thread-safe, not picklable.
    """

    def __init__(self, uri: str, sha256: str | None = None) -> None:
        """sha256: of all that will be written, where the caller knows it."""
        self.uri = uri
        self._size = 0
        self._sha256, self._digest = sha256, hashlib.sha256()
        self._hasher: ThreadPoolExecutor | None = None
        self._open = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends `data` (any C-contiguous buffer), and hashes it meanwhile; the caller may reuse the buffer afterwards.

        Raises `StorageError` when the store fails, `ValueError` after commit or abort.
        """
        self._require_open()
        view = memoryview(data).cast("B")
        self._size += len(view)
        METER.wrote(len(view))
        if self._sha256 is not None:
            self._append(view)
        elif len(view) < HASHED_BESIDE:
            self._digest.update(view)
            self._append(view)
        else:
            self._hasher = self._hasher or ThreadPoolExecutor(1, thread_name_prefix="hash")
            hashing = self._hasher.submit(self._digest.update, view)
            try:
                self._append(view)
            finally:
                hashing.result()

    def commit(self) -> Written:
        """Makes the object visible, whole, replacing an earlier one under the same key.

        Raises `StorageError` when the store fails (the object is then not visible, unless the store lost
        only its acknowledgement and could not be asked), `ValueError` after commit or abort.
        """
        self._require_open()
        self._publish()
        self._close()
        return Written(size=self._size, sha256=self._sha256 or self._digest.hexdigest())

    def abort(self) -> None:
        """Discards everything written; does nothing after commit or abort. Raises `StorageError`."""
        if self._open:
            self._close()
            self._discard()

    def _close(self) -> None:
        self._open = False
        if self._hasher is not None:
            self._hasher.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.abort()
        except StorageError as failure:
            if error is None:
                raise
            # The first error is the one to act on; what was left behind is for abort_stale_writes.
            error.add_note(f"and the abort failed: {failure}")

    def _require_open(self) -> None:
        if not self._open:
            raise ValueError(f"writer of {self.uri}: already committed or aborted")

    @abc.abstractmethod
    def _append(self, view: memoryview) -> None: ...

    @abc.abstractmethod
    def _publish(self) -> None: ...

    @abc.abstractmethod
    def _discard(self) -> None: ...


class ObjectStore(abc.ABC):
    """Objects below one root URI. Thread-safe, and picklable: it travels as its URI and opens itself again.

    Every method raises `RequestError` where trying again cannot help (a malformed key, a missing bucket,
    missing rights or credentials), `ObjectNotFoundError` where a named object is absent, and otherwise
    `StorageError`; each text names the operation, the URI and the cause in one line.

    No key may be a directory of another key (`a` and `a/b`): a file system cannot hold both. On `file:`, what is no regular
    file (a pipe, a device) is refused when it is read or looked up, and so is a link that leads out of the root.
    """

    uri: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """The whole object. With `sha256` (hex), every byte is verified: a mismatch is read once more,
        because a bit may have turned on the way, and then raises `IntegrityError`."""
        try:
            data = self._read(key)
        except IntegrityError:  # the store's own checksum already told
            data = self._read(key)
        if sha256 is None or sha256_hex(data) == sha256:
            return data
        data = self._read(key)
        actual = sha256_hex(data)
        if actual != sha256:
            raise IntegrityError(
                f"read {self.uri_of(key)}: sha256 is {actual} ({len(data)} bytes), expected {sha256}, twice"
            )
        return data

    def read_bounded(self, key: str, most: int) -> bytes:
        """The whole object, of at most `most` bytes; RequestError, before anything is read, for a larger one."""
        size = self.size(key)
        if size > most:
            raise RequestError(f"{self.uri_of(key)}: {size} bytes, expected at most {most}")
        # A range, not the object: what is read stays bounded when the object grows meanwhile.
        return self.read_range(key, 0, size) if size else b""

    @abc.abstractmethod
    def below(self, key: str) -> ObjectStore:
        """The store whose root is `key` in this one; on `s3:` they share connections."""

    @abc.abstractmethod
    def uri_of(self, key: str) -> str:
        """The object's own URI; `split_uri` takes it apart again."""

    @abc.abstractmethod
    def _read(self, key: str) -> bytes: ...

    @abc.abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from offset `start`; a range beyond the object's end is a `StorageError`."""

    @abc.abstractmethod
    def stream(self, key: str, *, start: int = 0, chunk: int = STREAM_CHUNK) -> Iterator[bytes]:
        """The bytes from `start` to the end, in pieces of at most `chunk` bytes.

        A connection that breaks, ends early or stalls is resumed where it stopped, at most three times; an
        object replaced meanwhile is a `StorageError`, never a mixture. `start` beyond the end is a
        `StorageError`.
        """

    def presigned(self, key: str, seconds: int) -> str | None:
        """A URL under which anybody may read the object for so many seconds, without credentials; None where the store has no
        such thing, as `file:` has none. The object is not asked for."""
        return None

    @abc.abstractmethod
    def size(self, key: str) -> int:
        """The object's size in bytes."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Whether an object is visible under `key`."""

    @abc.abstractmethod
    def write(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Writes the object whole: a reader sees the earlier object or this one. Replaces what is there."""

    @abc.abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Creates the object once: True when this call created it, False when the key was taken; of any
        number of concurrent callers exactly one gets True. The primitive of coordination, for small
        records.

        An acknowledgement lost on the way is resolved by asking the store whose object it is. When that too
        fails, `StorageError`: the outcome is unknown, and a further call may return False for this caller's
        own record.
        """

    @abc.abstractmethod
    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Writer:
        """A `Writer` for an object of any size. sha256 (hex): of its bytes, where the caller knows it; not computed again.

        durable: committed bytes survive a power failure. False is for what can be made again: on `file:` the commit then
        does not wait for the disk (two flushes, some 5 ms each); on `s3:` there is no difference. Atomic either way.
        """

    @abc.abstractmethod
    def copy(self, source_key: str, key: str) -> None:
        """Copies within the store, without the bytes passing through this process's network; replaces
        `key`."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix` (any string, not only a directory), in key order.

        Names that are no valid keys (directory markers and files that something else put there) and files
        being written are left out; on `file:`, linked files are listed (reading one that leads out of the root is refused),
        linked directories are not entered.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Deletes the object; a key without an object is not an error."""

    @abc.abstractmethod
    def now(self) -> datetime:
        """The time by the clock that dates objects (`ObjectInfo.modified`): ours may differ by minutes. On `file:` a
        temporary file is written for it, because a file server has a clock of its own."""

    @abc.abstractmethod
    def touch(self, key: str, older_than: timedelta) -> bool:
        """Makes an object as young as one that was just written, where it is older than `older_than`; its bytes stay.
        False when there is no such object. On `s3:` the server copies the object onto itself."""

    @abc.abstractmethod
    def stale_writes(self, older_than: timedelta) -> Iterator[StaleWrite]:
        """What killed writers left below the root (temporary files, multipart uploads) and that was begun longer than
        `older_than` ago."""

    @abc.abstractmethod
    def abort_write(self, stale: StaleWrite) -> bool:
        """Removes one of `stale_writes`; False when it is gone already, because its writer finished or another sweep was
        first."""

    def abort_stale_writes(self, older_than: timedelta) -> int:
        """Removes all `stale_writes`; returns how many. An age that no live writer reaches is the caller's duty."""
        return sum(self.abort_write(stale) for stale in self.stale_writes(older_than))


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """The sha256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def stream_sha256(store: ObjectStore, key: str) -> str:
    """The sha256 of an object, read piece by piece, each while a thread hashes the one before it."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
        hashing: Future[None] | None = None
        for piece in store.stream(key):
            if hashing is not None:
                hashing.result()
            hashing = hasher.submit(digest.update, piece)
    return digest.hexdigest()
