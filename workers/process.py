"""A worker as a process of its own: what Ray starts. Light on purpose, because the driver imports it before Ray runs.

The driver would otherwise load all that workers compute with, and only then ask Ray for processes that load it again.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from counterweight.workers.tasks import Device


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
    """Passes calls on to a `Worker` that is imported and made in the process itself."""

    def __init__(self, device: Device, threads: int) -> None:
        with importing():
            from counterweight.workers.worker import Worker
        self._worker = Worker(device, threads)

    def call(self, method: str, *arguments: Any) -> Any:
        """What the worker's `method` returns for `arguments`."""
        return getattr(self._worker, method)(*arguments)
