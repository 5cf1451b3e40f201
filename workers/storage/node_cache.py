"""Ranges of objects that several workers of one machine need, read from a remote store by one of them.

They lie in a folder of the machine's temporary files while any of these workers is at work, the oldest dropped where they are
too many. A lock that the system takes off a process that dies says who is: whoever leaves last removes the folder, and whoever
comes later removes what the dead have left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from counterweight.workers.storage.base import ObjectStore
from counterweight.workers.storage.names import file_root

NODE_BYTES = 8 << 30
"""Of a machine's disk that ranges take at most; half of what is free where that is less. A block of Mixtral-8x22B in 4 bits
takes 1.3 GB, of DeepSeek-V3 5.7: workers that read a block ahead are within two blocks of each other."""

_USERS = "users"


class NodeCache:
    """The store's `read_range`, shared with other processes of this user that name the same content. A context manager;
    thread-safe. A `file:` store is read as it is: the system keeps its files in memory for all.

    content: names what the objects hold, which does not change; bytes are not verified here. limit: bytes.
    """

    def __init__(self, store: ObjectStore, content: str, limit: int = NODE_BYTES) -> None:
        self._store, self._limit = store, limit
        self._folder = _root() / hashlib.sha256(f"{store.uri} {content}".encode()).hexdigest()
        self._user: BinaryIO | None = None

    def __enter__(self) -> Self:
        if file_root(self._store.uri) is None:
            with suppress(OSError):  # no room, or nothing may be written: every worker reads for itself
                self._join()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._user is not None:
            self._user.close()
            self._user = None
            _remove_unused(self._folder)

    def _join(self) -> None:
        if _is_ours(_root()):
            for other in _root().iterdir():
                _remove_unused(other)
            self._user = _joined(self._folder)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See `ObjectStore.read_range`. Where another reads the same range, waits for it."""
        path = self._folder / hashlib.sha256(f"{key} {start} {length}".encode()).hexdigest()
        try:
            held = None if self._user is None else path.open("a+b")
        except OSError:  # no room for a name
            held = None
        if held is None:
            return self._store.read_range(key, start, length)
        with held as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            data = file.read()
            if len(data) == length:
                return data
            data = self._store.read_range(key, start, length)
            try:
                file.truncate(0)
                file.write(data)
                file.flush()
            except OSError:  # no room: what is there in part is too short, so nobody takes it
                path.unlink(missing_ok=True)
        self._make_room()
        return data

    def _make_room(self) -> None:
        limit = min(self._limit, shutil.disk_usage(self._folder).free // 2)
        files = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another has dropped it
                if path.name != _USERS:
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def _root() -> Path:
    return Path(tempfile.gettempdir()) / f"counterweight-node-{os.getuid()}"


def _is_ours(folder: Path) -> bool:
    """Makes a folder that nobody else may look into; whether it is one."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _joined(folder: Path) -> BinaryIO:
    """The folder's list of users, locked with others. Made again where the last one was just leaving."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            user = (folder / _USERS).open("a+b")
        except FileNotFoundError:
            continue
        fcntl.flock(user, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if (folder / _USERS).stat().st_ino == os.fstat(user.fileno()).st_ino:
                return user
        user.close()


def _remove_unused(folder: Path) -> None:
    """Removes a folder that nobody uses."""
    with suppress(FileNotFoundError, NotADirectoryError, BlockingIOError), (folder / _USERS).open("rb") as users:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
