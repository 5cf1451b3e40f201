"""Time in which this process ran: who was stopped himself, or whose machine slept, has heard nobody."""

from __future__ import annotations

import time
from collections.abc import Callable

AWAKE_SECONDS = 10.0
"""Longest step between two looks that counts."""


class Awake:
    """A clock that must be looked at often. clock: seconds, that go on when the process is stopped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked, self._seconds = clock(), 0.0

    def __call__(self) -> float:
        """Seconds since the beginning; of each step between two calls at most `AWAKE_SECONDS`."""
        now = self._clock()
        self._seconds += min(now - self._looked, AWAKE_SECONDS)
        self._looked = now
        return self._seconds
