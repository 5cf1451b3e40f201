"""What a worker reads on a thread of its own while it computes: one thing, that it will probably need next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class ReadAhead:
    """One thing by its key, so that memory is bounded; beginning with another drops it.

    on: whether anything is read ahead. Where computing takes every core that the worker has, a second thread only takes
    turns with it, and there is one thing more in memory: everything is read when it is taken.
    """

    def __init__(self, *, on: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead") if on else None
        self._waiting: tuple[str, Future[object]] | None = None

    def begin(self, key: str, read: Callable[[], object]) -> None:
        """Starts to read what will be taken by this key, where that has not begun. An error of it is raised by who takes it,
        and by nobody else."""
        if self._thread is not None and (self._waiting is None or self._waiting[0] != key):
            self.drop()
            self._waiting = (key, self._thread.submit(read))

    def take(self, key: str, read: Callable[[], T]) -> T:
        """What was read ahead by this key, held no longer; otherwise it is read now. read: gives the same as it did then."""
        if self._waiting is None or self._waiting[0] != key:
            return read()
        found, self._waiting = self._waiting[1], None
        return found.result()  # type: ignore[return-value]

    def in_turn(self, name: str, count: int, read: Callable[[int], T]) -> Iterator[T]:
        """`count` things, each of which is read while one works with that before it. name: part of their keys."""
        try:
            for index in range(count):
                found = self.take(f"{name} {index}", partial(read, index))
                if index + 1 < count:
                    self.begin(f"{name} {index + 1}", partial(read, index + 1))
                yield found
                del found  # before the next one is waited for
        finally:
            self.drop()

    def drop(self) -> None:
        """Lets go of what nobody has taken; what is being read is gone when it has been."""
        if self._waiting is not None:
            self._waiting[1].cancel()
            self._waiting = None

    def close(self) -> None:
        """Ends the thread."""
        self.drop()
        if self._thread is not None:
            self._thread.shutdown()
