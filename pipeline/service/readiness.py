"""Whether the job store can be read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from counterweight.pipeline.jobs.store import JobStore

REMEMBERED_SECONDS = 2.0


@dataclass
class Readiness:
    """Asks the store at most once in `REMEMBERED_SECONDS`, because anybody may ask us."""

    jobs: JobStore
    clock: Callable[[], float] = time.monotonic
    _good_until: float = field(default=float("-inf"))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """SurroundingsError when the store cannot be read."""
        with self._lock:
            if self.clock() >= self._good_until:
                self.jobs.limits()
                self._good_until = self.clock() + REMEMBERED_SECONDS
