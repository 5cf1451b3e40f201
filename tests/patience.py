"""How long tests wait for what has to happen: such a limit is there for what hangs, never for what is merely slow."""

from __future__ import annotations

import os
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds of wall time; what is waited for takes at most 60 of them on two idle cores. pyproject.toml gives a whole test twice
as long."""

TRIES = 3


def cpu_seconds(run: Callable[[], object], below: float) -> float:
    """CPU seconds of this process and of its children that have ended, which `run` takes: the least of up to `TRIES`, because
    others share the processor's caches and cores, and a first call may import. The last one when it is below a limit."""
    least = float("inf")
    for _ in range(TRIES):
        before = sum(os.times()[:4])
        run()
        least = min(least, sum(os.times()[:4]) - before)
        if least < below:
            break
    return least
