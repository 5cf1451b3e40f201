"""A worker as a process of its own: what Ray starts. Light on purpose, because the driver imports it before Ray runs.

The driver would otherwise load all that workers compute with, and only then ask Ray for processes that load it again.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from counterweight.workers.identity import Token, WorkerReport
    from counterweight.workers.tasks.setting import Device
    from counterweight.workers.tasks.task import Task

R = TypeVar("R")


@contextmanager
def importing() -> Iterator[None]:
    """Rests the garbage collector: torch and transformers make a million objects that stay, and looking at them again
    and again is a sixth of the time that importing them takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class WorkerProcess:
    """Passes tasks on to a `Worker` that is imported and made in the process itself."""

    def __init__(self, device: Device, threads: int) -> None:
        with importing():
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

    def run(self, task: Task[R]) -> R:
        """What the task gives back."""
        return self._worker.run(task)
