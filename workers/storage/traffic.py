"""How many bytes this process has read from stores and written to them; what was repeated, as often as it was."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes."""

    read: int = 0
    written: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.read - earlier.read, self.written - earlier.written)


NONE = Traffic()


class Meter:
    """Counts bytes, of all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sum = NONE

    @property
    def now(self) -> Traffic:
        """Since this process began."""
        return self._sum

    def read(self, size: int) -> None:
        """So many bytes came from a store."""
        with self._lock:
            self._sum = Traffic(self._sum.read + size, self._sum.written)

    def wrote(self, size: int) -> None:
        """So many bytes go to a store."""
        with self._lock:
            self._sum = Traffic(self._sum.read, self._sum.written + size)


METER = Meter()
"""Of this process."""
