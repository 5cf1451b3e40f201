"""Tasks on workers: who is idle, what came back, what is tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from counterweight.pipeline.policies import Failure, RetryPolicy, Verdict, describe
from counterweight.pipeline.pool import Outcome, WorkerPool
from counterweight.workers.errors import CounterweightError, WorkerError
from counterweight.workers.tasks.task import Task

R = TypeVar("R")

WAIT_SECONDS = 0.2
"""How long one look at the workers lasts: short enough that an interrupt is felt at once."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A task that left its worker: with what it gave back, or to be tried again (retry), perhaps because the worker died."""

    task: Task[Any]
    worker: int
    value: Any = None
    retry: bool = False
    worker_died: bool = False


class Dispatcher:
    """Starts tasks on idle workers and turns outcomes into values, retries or a final error."""

    def __init__(self, pool: WorkerPool, policy: RetryPolicy, note: Callable[[str], None]) -> None:
        self._pool, self._policy, self._note = pool, policy, note
        self._running: dict[int, Task[Any]] = {}
        self._tries: dict[str, int] = {}
        self.idle: list[int] = list(range(pool.size))
        """Longest idle first: a fresh process, which has torch to import, comes behind those that wait, and a task that
        failed is tried on another worker when there is one."""

    def start(self, worker: int, task: Task[Any]) -> None:
        """Starts a task on an idle worker."""
        self.idle.remove(worker)
        self._tries[task.name] = self._tries.get(task.name, 0) + 1
        self._running[self._pool.submit(worker, task)] = task

    def collect(self) -> list[Finished]:
        """What finished within `WAIT_SECONDS`. Raises the task's error when it is final, the worker's process first
        replaced when it died."""
        return [self._settle(outcome) for outcome in self._pool.wait(WAIT_SECONDS)]

    def run_all(
        self,
        tasks: Sequence[Task[R]],
        done: Callable[[int], None] = lambda _: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[R]:
        """Runs independent tasks on any workers; their values in the tasks' order. done: called with the number of
        finished tasks after each. meanwhile: called once, when the first of them have been started."""
        waiting = list(range(len(tasks)))
        index_of = {task.name: index for index, task in enumerate(tasks)}
        values: dict[int, R] = {}

        def start_some() -> None:
            while waiting and self.idle:
                self.start(self.idle[0], tasks[waiting.pop(0)])

        start_some()
        meanwhile()
        while len(values) < len(tasks):
            for finished in self.collect():
                index = index_of[finished.task.name]
                if finished.retry:
                    waiting.insert(0, index)
                else:
                    values[index] = finished.value
                    done(len(values))
            start_some()
        return [values[index] for index in range(len(tasks))]

    def _settle(self, outcome: Outcome) -> Finished:
        task = self._running.pop(outcome.ticket)
        if outcome.worker_died:
            self._pool.restart(outcome.worker)
        self.idle.append(outcome.worker)
        if outcome.error is None:
            return Finished(task, outcome.worker, value=outcome.value)
        tries = self._tries[task.name]
        verdict = self._policy.judge(Failure(outcome.error, outcome.worker_died), tries)
        if verdict is Verdict.FAIL:
            raise _named(task, outcome.error, tries)
        self._note(f"{task.name}: try {tries} of {self._policy.attempts} failed: {describe(outcome.error)}")
        return Finished(task, outcome.worker, retry=True, worker_died=outcome.worker_died)


def _named(task: Task[Any], error: BaseException, tries: int) -> BaseException:
    """The final error with the task's name in it, keeping its class and so its exit code."""
    attempts = f" after {tries} tries" if tries > 1 else ""
    if isinstance(error, CounterweightError):
        named = type(error)(f"{task.name}{attempts}: {error}")
    else:
        named = WorkerError(f"{task.name}{attempts}: {describe(error)}")
    named.__cause__ = error
    return named
