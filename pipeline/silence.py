"""The net below everything that notices a fault by itself: a job of which nothing is heard ends, and says who waits for whom.

A frozen or dead worker is noticed by the pool, within seconds; storage that is away by whoever asks it. What is left is a task
that never comes back though its worker is alive, and a defect of ours that leaves everybody waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.awake import Awake
from counterweight.pipeline.pool import START_SECONDS
from counterweight.pipeline.units import seconds_text
from counterweight.workers.errors import WorkerError
from counterweight.workers.tasks.patience import BASE_SECONDS
from counterweight.workers.tasks.task import Task

SHOWN = 5
"""Tasks and workers that the error names."""


@dataclass(frozen=True, slots=True)
class Running:
    """A task on a worker. since: when it was started, by the clock of whoever started it."""

    task: Task[object]
    worker: int
    since: float


class Silence:
    """How long no task has been started and none has come back. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._awake = clock, Awake(clock)
        self._since = self._awake()

    def broken(self) -> None:
        """Something has happened."""
        self._since = self._awake()

    def check(self, running: Sequence[Running], idle: Sequence[int], awaited: Sequence[str]) -> None:
        """WorkerError when it lasts longer than the most patient of the running tasks says; without any, longer than workers
        may take to start. awaited: names of what whoever runs the tasks waits for."""
        now, silent = self._clock(), self._awake() - self._since
        bound = max((one.task.patience for one in running), default=BASE_SECONDS + START_SECONDS)
        if silent <= bound:
            return
        states = {one.worker: f"on {one.task.name} for {seconds_text(now - one.since)}" for one in running}
        states |= dict.fromkeys((worker for worker in idle if worker not in states), "idle")
        raise WorkerError(
            f"no task has begun or come back for {seconds_text(silent)}, and {seconds_text(bound)} is the most that it "
            f"may take: {_workers(states)}; waited for: {_some(awaited)}"
        )


def _workers(states: Mapping[int, str]) -> str:
    return _some([f"worker {worker} is {state}" for worker, state in sorted(states.items())]) or "no worker is there"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
