"""Tasks on workers: who is idle, what came back, what is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from counterweight.pipeline.events import Event, Note, TaskFinished, TaskRetried, TaskStarted
from counterweight.pipeline.graph import Graph, Node, giving
from counterweight.pipeline.policies import Failure, RetryPolicy, Verdict, describe
from counterweight.pipeline.pool import Outcome, WorkerPool
from counterweight.pipeline.silence import Running, Silence
from counterweight.workers.errors import CounterweightError, ObjectNotFoundError, WorkerError
from counterweight.workers.tasks.task import Task

R = TypeVar("R")

WAIT_SECONDS = 0.2
"""How long one look at the workers lasts: short enough that an interrupt is felt at once."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A task that left its worker: with what it gave back, or to be tried again (retry), perhaps because something that it
    reads is gone. left: it failed for good, and the job does without it."""

    task: Task[object]
    worker: int
    value: object = None
    retry: bool = False
    gone: bool = False
    left: bool = False


class Dispatcher:
    """Starts tasks on idle workers and turns outcomes into values, retries or a final error.

    graph: the job's tasks, in which `run` finds what can start. emit: told of every task that starts, ends or is tried again.
    """

    def __init__(
        self,
        pool: WorkerPool,
        policy: RetryPolicy,
        emit: Callable[[Event], None],
        graph: Graph | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._policy, self._emit = pool, policy, emit
        self._clock, self._silence = clock, Silence(clock)
        self._running: dict[int, Running] = {}
        self._nodes: dict[str, Node[object]] = {}
        self._tries: dict[str, int] = {}
        self.graph = graph or Graph()
        self.workers = pool.size

    def start(self, worker: int, task: Task[object]) -> None:
        """Starts a task on an idle worker."""
        self._tries[task.name] = self._tries.get(task.name, 0) + 1
        self._running[self._pool.submit(worker, task)] = Running(task, worker, self._clock())
        self._silence.broken()
        self._emit(TaskStarted(task.name, task.kind, worker, task.block_index))

    def collect(self, awaited: Sequence[Node[object]] = ()) -> list[Finished]:
        """What finished within `WAIT_SECONDS`. Raises the task's error when it is final, and WorkerError when nothing has for
        longer than it may take. awaited: nodes that it is done for, told then."""
        outcomes = self._pool.wait(WAIT_SECONDS)
        for outcome in outcomes:
            if outcome.worker_died:
                self.graph.lost(outcome.worker)
        found = [self._settle(outcome) for outcome in outcomes if outcome.ticket]
        if found:
            self._silence.broken()
        else:
            names = [_place(node) for node in awaited if not node.done]
            self._silence.check(list(self._running.values()), self._pool.idle(), names)
        return found

    def run(
        self,
        wanted: Collection[Node[R]],
        finished: Callable[[Node[R]], None] = lambda _: None,
    ) -> list[R]:
        """Runs the graph until the `wanted` nodes are done; their values. Other nodes that can run are started too, earlier
        ones first, and may still be running at the end. finished: called with each of the wanted when it is."""
        self._start_some()
        awaited = {id(node): node for node in wanted}
        pending = list(wanted)
        while pending:
            if pending[-1].done:
                pending.pop()
                continue
            if not self._running and self._pool.idle():
                waiting = next(node for node in wanted if not node.done)
                raise WorkerError(f"{_place(waiting)}: nothing runs and nothing that it waits for can start")
            for found in self.collect(pending):
                node = self._nodes.pop(found.task.name)
                if found.left:
                    self.graph.leave(node)
                    continue
                if found.retry:
                    self.graph.failed(node, gone=found.gone)
                    continue
                self.graph.settle(node, found.worker, found.value)
                if (one := awaited.get(id(node))) is not None:
                    finished(one)
            unread = self.graph.unread()
            if self._pool.room != 0 and unread:
                self._pool.forget(unread)
            self._start_some()
        return [node.value for node in wanted]

    def run_all(
        self,
        tasks: Sequence[Task[R]],
        done: Callable[[int], None] | None = None,
    ) -> list[R]:
        """Runs independent tasks on any workers; their values in the tasks' order. done: called with the number of
        finished tasks after each."""
        nodes = [self.graph.add(giving(task)) for task in tasks]
        if done is None:
            return self.run(nodes)
        return self.run(nodes, lambda _: done(sum(node.done for node in nodes)))

    def _start_some(self) -> None:
        for worker in list(self._pool.idle()):
            node = self.graph.assign(worker)
            if node is None:
                continue
            task = node.made()
            self._nodes[task.name] = node
            self.start(worker, task)

    def _settle(self, outcome: Outcome) -> Finished:
        started = self._running.pop(outcome.ticket)
        task = started.task
        if outcome.error is None:
            seconds = self._clock() - started.since
            moved = outcome.traffic
            self._emit(
                TaskFinished(task.name, task.kind, outcome.worker, seconds, task.block_index, moved.read, moved.written)
            )
            return Finished(task, outcome.worker, value=outcome.value)
        tries = self._tries[task.name]
        verdict = self._policy.judge(Failure(outcome.error, outcome.worker_died), tries)
        if verdict is Verdict.FAIL:
            node = self._nodes.get(task.name)
            if node is None or node.before is None:
                raise _named(task, outcome.error, tries)
            self._emit(Note(f"{task.name}: left to that job: {describe(outcome.error)}"))
            return Finished(task, outcome.worker, left=True)
        cause = describe(outcome.error)
        self._emit(TaskRetried(task.name, outcome.worker, tries, self._policy.attempts, cause, outcome.worker_died))
        return Finished(task, outcome.worker, retry=True, gone=isinstance(outcome.error, ObjectNotFoundError))


def _place(node: Node[R]) -> str:
    """A node, for people: its task's name once that is made."""
    return f"node {node.place}" if node.task is None else node.task.name


def _named(task: Task[object], error: BaseException, tries: int) -> BaseException:
    """The final error with the task's name in it, keeping its class and so its exit code."""
    attempts = f" after {tries} tries" if tries > 1 else ""
    if isinstance(error, CounterweightError):
        named = type(error)(f"{task.name}{attempts}: {error}")
    else:
        named = WorkerError(f"{task.name}{attempts}: {describe(error)}")
    named.__cause__ = error
    return named
