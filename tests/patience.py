"""How long tests wait for what has to happen: such a limit is there for what hangs, never for what is merely slow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds of wall time; what is waited for takes at most 60 of them on two idle cores. pyproject.toml gives a whole test twice
as long."""

TRIES = 3

MAX_CPU = 2.0
"""Seconds of CPU that a hostile input may cost beyond a harmless one."""


def of_children() -> float:
    """CPU seconds of this process's children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def cpu_seconds(run: Callable[[], object], below: float, clock: Callable[[], float] = time.process_time) -> float:
    """CPU seconds that `run` takes, of this process if no other clock is given: the least of up to `TRIES`. Others share
    the processor's caches and cores, and a first call may import. None follows one that is below a limit."""
    least = float("inf")
    for _ in range(TRIES):
        before = clock()
        run()
        least = min(least, clock() - before)
        if least < below:
            break
    return least
