"""A pool whose workers die."""

from __future__ import annotations

from counterweight.pipeline.pool import Outcome
from counterweight.workers.errors import WorkerError
from counterweight.workers.tasks.task import Task
from counterweight.workers.worker import Worker
from tests.common_memory import Member
from tests.inprocess import InProcessPool


class MortalPool(InProcessPool):
    """Each task kills a worker twice: before it begins, and behind its commit, when nobody has heard of it yet. What the worker
    held in memory is gone each time."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(workers)
        self.deaths = 0
        self._tries: dict[str, int] = {}

    def submit(self, worker: int, task: Task[object]) -> int:
        tries = self._tries[task.name] = self._tries.get(task.name, 0) + 1
        if tries > 2:
            return super().submit(worker, task)
        self.calls.append((worker, task.kind))
        if tries == 2:
            self._members[worker].run(task, [], self._references.given(worker, task))
        self._members[worker].worker.close()
        self._members[worker] = Member(Worker("cpu", self.threads), shares=self.size > 1)
        self._references.lost(worker)
        self.deaths += 1
        ticket = len(self.calls)
        self._finished.append(Outcome(ticket, worker, error=WorkerError("died"), worker_died=True))
        return ticket
