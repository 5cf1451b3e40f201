"""A worker as a process of its own: what Ray starts. Light on purpose, because the driver imports it before Ray runs.

The driver would otherwise load all that workers compute with, and only then ask Ray for processes that load it again.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from counterweight.workers.identity import Token, WorkerReport
    from counterweight.workers.storage.traffic import Traffic
    from counterweight.workers.tasks.setting import Device
    from counterweight.workers.tasks.task import Task
    from counterweight.workers.workspace import Blob

R = TypeVar("R")

LOOK_SECONDS = 5.0
"""Between two looks at the threads of a worker."""

LOOKS = 6
"""In a row at which a thread may not have begun yet."""

LOST_THREAD = 75
"""Exit code of a worker with such a thread."""


@contextmanager
def importing() -> Iterator[None]:
    """Rests the garbage collector: torch and transformers make a million objects that stay, and looking at them again
    and again is a sixth of the time that importing them takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # What was made meanwhile counts as old: otherwise all of it is looked at as soon as the collector is back.
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def import_computing() -> None:
    """Imports what tasks compute with: torch, transformers and ours, 3 CPU seconds."""
    with importing():
        import counterweight.workers.compressed_block
        import counterweight.workers.evaluation
        import counterweight.workers.worker  # noqa: F401


def end_with_lost_threads() -> None:
    """Ends this process where a thread was started and does not begin. Python (3.11) raises nothing where a new thread gets no
    memory, and whoever has started it waits for ever."""
    looks: dict[threading.Thread, int] = {}
    while True:
        time.sleep(LOOK_SECONDS)
        with suppress(MemoryError):
            looks = {one: looks.get(one, 0) + 1 for one in threading.enumerate() if one.ident is None}
        if max(looks.values(), default=0) > LOOKS:
            print("out of memory: a thread could not begin", file=sys.stderr, flush=True)
            os._exit(LOST_THREAD)


@dataclass(frozen=True, slots=True)
class Done(Generic[R]):
    """A task's value, and what passed between this process and stores meanwhile."""

    value: R
    traffic: Traffic


class WorkerProcess:
    """Passes tasks on to a `Worker` that is imported and made in the process itself."""

    def __init__(self, device: Device, threads: int) -> None:
        threading.Thread(target=end_with_lost_threads, daemon=True, name="threads").start()
        import_computing()
        gc.freeze()  # for the life of this process: looking at all of it once takes 0.3 s
        from counterweight.workers.worker import Worker

        self._worker = Worker(device, threads)

    def ready(self, token: Token | None) -> WorkerReport:
        """Who this worker is. token: what it should find in the job's storage."""
        from counterweight.workers.identity import report

        return report(self._worker.ready(), token, self._worker.gpu_bytes)

    def pulse(self) -> str:
        """What the task beside waits for, for people. A process that is stopped, or whose host is, does not answer."""
        from counterweight.workers.storage.outages import OUTAGES

        return OUTAGES.now

    def run(self, task: Task[R], unread: Sequence[Blob] = ()) -> Done[R]:
        """What the task gives back. unread: hidden states that no task reads any more."""
        from counterweight.workers.storage.traffic import METER

        before = METER.now
        return Done(self._worker.run(task, unread), METER.now - before)
