"""Bounds of what one token or one peer may ask of this instance. They are counted in its memory: of two instances side by side
each grants the whole of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MAX_BUCKETS = 10_000


@dataclass
class Throttle:
    """A token bucket for each name. rate: requests a second in the long run. burst: requests at once. streams: open ones of one
    name. clock: seconds."""

    rate: float = 20.0
    burst: int = 100
    streams: int = 32
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> requests that are left, and when that was so."""
    _open: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, name: str) -> float:
        """Takes a request from a name's bucket: 0. Where it is empty, takes nothing: seconds until there is one."""
        with self._lock:
            now = self.clock()
            left = self._left(name, now)
            if left < 1:
                return (1 - left) / self.rate
            if name not in self._buckets and len(self._buckets) >= MAX_BUCKETS:
                self._forget(now)
            self._buckets[name] = (left - 1, now)
            return 0.0

    def crowded(self, name: str) -> bool:
        """Whether a name has as many streams open as it may."""
        return self._open[name] >= self.streams

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Counts a stream while it is open."""
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1

    def _left(self, name: str, now: float) -> float:
        left, at = self._buckets.get(name, (float(self.burst), now))
        return min(float(self.burst), left + (now - at) * self.rate)

    def _forget(self, now: float) -> None:
        """Full buckets are as good as none; where none is full, all are forgotten, because memory is bounded."""
        kept = {name: bucket for name, bucket in self._buckets.items() if self._left(name, now) < self.burst}
        self._buckets = kept if len(kept) < MAX_BUCKETS else {}
