"""A worker: one process, one device, doing tasks one after another. Knows no job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

from counterweight.workers.context import TaskContext
from counterweight.workers.errors import OutOfMemoryError
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.memory import gpu_bytes, ran_out, release, settle
from counterweight.workers.tasks.setting import Device
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob

R = TypeVar("R")


class Worker:
    """Runs tasks on one device.

    device: `cuda` runs on the GPU when there is one and on the CPU otherwise; the records say which it was.
    threads: on a CPU, how many threads share the shards and the solves; results do not depend on it.
    hold_bytes: see `HOLD_BYTES`; nor on this.
    """

    def __init__(self, device: Device = "cpu", threads: int = 1, hold_bytes: int = HOLD_BYTES) -> None:
        # One thread inside an operation, several operations at a time: bits then do not depend on `threads`.
        torch.set_num_threads(1)
        # Float32 products must be float32 products: TF32 keeps 10 bits of mantissa.
        torch.backends.cuda.matmul.allow_tf32 = False
        on_gpu = device == "cuda" and torch.cuda.is_available()
        self.context = TaskContext(torch.device("cuda" if on_gpu else "cpu"), 1 if on_gpu else threads, hold_bytes)
        self._failed = False  # the last task, which then has let go of nothing
        settle()

    def ready(self) -> str:
        """The kind of device this worker computes on."""
        return self.context.device.type

    @property
    def gpu_bytes(self) -> int:
        """Memory of its GPU; 0 without one."""
        return gpu_bytes(self.context.device)

    def run(self, task: Task[R], unread: Iterable[Blob] = ()) -> R:
        """What the task gives back, or its error. unread: hidden states that no task reads any more. OutOfMemoryError where
        this process gets no more memory."""
        self.context.mailbox.forget(unread)
        if self.context.training.keep(task.trains) or self._failed:
            release(self.context.device)
        self._failed = True
        try:
            found = task.run(self.context)
        except Exception as error:
            if not ran_out(error):
                raise
            raise OutOfMemoryError(f"out of memory: {error}".splitlines()[0].rstrip(": ")) from error
        self._failed = False
        return found

    def close(self) -> None:
        """Drops what is held and ends the threads."""
        self.context.close()
