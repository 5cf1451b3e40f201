"""What the dispatcher does with outcomes, on a pool that plays a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.events import Event, TaskFinished, TaskRetried, TaskStarted
from counterweight.pipeline.graph import Graph
from counterweight.pipeline.policies import RetryPolicy
from counterweight.pipeline.pool import Outcome
from counterweight.workers.context import TaskContext
from counterweight.workers.errors import (
    CheckpointError,
    CounterweightError,
    IntegrityError,
    RequestError,
    StorageError,
    WorkerError,
)
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob

DIED = "died"
"""In a script: the worker's process is gone."""


@dataclass(frozen=True)
class Numbered(Task[tuple[str, int]]):
    """A task of its own kind, which gives back its kind and number."""

    number: int

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"m{self.number}"

    @property
    def name(self) -> str:
        return f"task {self.number}"

    @property
    def patience(self) -> float:
        return 1000.0

    def run(self, context: TaskContext) -> tuple[str, int]:
        return self.kind, self.number


class ScriptedPool:
    """Each task takes the next item of its kind's script; without one it gives back its value."""

    def __init__(self, size: int, script: dict[str, Sequence[Any]] | None = None) -> None:
        self.size, self.threads = size, 1
        self.room: int | None = 0
        self.calls: list[tuple[int, str]] = []
        self.order: Callable[[list[Outcome]], list[Outcome]] = lambda outcomes: outcomes[:1]
        self._script = {method: list(items) for method, items in (script or {}).items()}
        self._waiting: list[Outcome] = []
        self._idle = list(range(size))
        self.absent: dict[int, int] = {}
        """Worker -> looks at the pool until it is there."""

    def idle(self) -> list[int]:
        return [worker for worker in self._idle if worker not in self.absent]

    def submit(self, worker: int, task: Task[object]) -> int:
        self._idle.remove(worker)
        assert worker not in [outcome.worker for outcome in self._waiting], "a busy worker was given a task"
        self.calls.append((worker, task.kind))
        ticket = len(self.calls)
        items = self._script.get(task.kind, [])
        item = items.pop(0) if items else None
        if item == DIED:
            outcome = Outcome(ticket, worker, error=WorkerError(f"worker {worker} died"), worker_died=True)
        elif isinstance(item, BaseException):
            outcome = Outcome(ticket, worker, error=item)
        else:
            outcome = Outcome(ticket, worker, value=task.run(None))  # type: ignore[arg-type]
        self._waiting.append(outcome)
        return ticket

    def wait(self, seconds: float) -> list[Outcome]:
        assert seconds < 1, "an interrupt would not be felt"
        self.absent = {worker: looks - 1 for worker, looks in self.absent.items() if looks > 1}
        chosen = self.order(self._waiting)
        self._waiting = [outcome for outcome in self._waiting if outcome not in chosen]
        self._idle += [outcome.worker for outcome in chosen]
        return chosen

    def forget(self, unread: Sequence[Blob]) -> None:
        raise AssertionError("nothing is passed on")

    def close(self) -> None:
        return None


def tasks(count: int) -> list[Numbered]:
    return [Numbered(number) for number in range(count)]


def dispatcher(pool: ScriptedPool, events: list[Event] | None = None) -> Dispatcher:
    return Dispatcher(pool, RetryPolicy(), ([] if events is None else events).append)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("backwards", [False, True])
def test_values_come_in_the_tasks_order_whoever_finishes_first(size: int, backwards: bool) -> None:
    pool = ScriptedPool(size)
    if backwards:
        pool.order = lambda outcomes: outcomes[-1:]
    done: list[int] = []
    values = dispatcher(pool).run_all(tasks(7), done.append)
    assert values == [(f"m{number}", number) for number in range(7)]
    assert done == [1, 2, 3, 4, 5, 6, 7]
    assert {worker for worker, _ in pool.calls} == set(range(size))


def test_several_outcomes_at_once_are_all_taken_in() -> None:
    pool = ScriptedPool(3)
    pool.order = lambda outcomes: list(outcomes)
    assert len(dispatcher(pool).run_all(tasks(8))) == 8


def test_nothing_to_do_is_done() -> None:
    assert dispatcher(ScriptedPool(1)).run_all([]) == []


@pytest.mark.parametrize("failures", [1, 2])
def test_failing_surroundings_are_tried_again_and_noted(failures: int) -> None:
    events: list[Event] = []
    pool = ScriptedPool(2, {"m1": [StorageError("write s3://b/k: 503 SlowDown")] * failures})
    values = dispatcher(pool, events).run_all(tasks(3))
    assert values[1] == ("m1", 1)
    assert [method for _, method in pool.calls].count("m1") == failures + 1
    expected = [f"task 1: try {n + 1} of 3 failed: write s3://b/k: 503 SlowDown" for n in range(failures)]
    assert [event.text for event in events if isinstance(event, TaskRetried)] == expected
    assert len([event for event in events if isinstance(event, TaskStarted)]) == 3 + failures
    assert len([event for event in events if isinstance(event, TaskFinished)]) == 3


def test_after_three_tries_the_error_is_final_and_keeps_its_class() -> None:
    pool = ScriptedPool(2, {"m1": [IntegrityError("sha256 differs")] * 9})
    with pytest.raises(IntegrityError, match=r"^task 1 after 3 tries: sha256 differs$") as caught:
        dispatcher(pool).run_all(tasks(3))
    assert caught.value.exit_code == 4
    assert [method for _, method in pool.calls].count("m1") == 3


@pytest.mark.parametrize("error", [RequestError("not finite"), CheckpointError("changed while the job ran")])
def test_a_wrong_request_is_final_at_once(error: CounterweightError) -> None:
    pool = ScriptedPool(1, {"m0": [error]})
    with pytest.raises(type(error), match=rf"^task 0: {error}$") as caught:
        dispatcher(pool).run_all(tasks(2))
    assert caught.value.exit_code == 2
    assert caught.value.__cause__ is error
    assert pool.calls == [(0, "m0")]


def test_a_defect_is_not_repeated_and_is_named() -> None:
    pool = ScriptedPool(1, {"m0": [ZeroDivisionError("division by zero")]})
    with pytest.raises(WorkerError, match=r"^task 0: ZeroDivisionError: division by zero$") as caught:
        dispatcher(pool).run_all(tasks(2))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert pool.calls == [(0, "m0")]


def test_a_worker_that_is_not_there_yet_is_given_nothing() -> None:
    pool = ScriptedPool(2)
    pool.absent = {1: 4}
    assert len(dispatcher(pool).run_all(tasks(6))) == 6
    assert [worker for worker, _ in pool.calls][:4] == [0, 0, 0, 0]
    assert 1 in [worker for worker, _ in pool.calls]


def test_a_job_waits_for_its_first_worker() -> None:
    pool = ScriptedPool(1)
    pool.absent = {0: 3}
    assert len(dispatcher(pool).run_all(tasks(2))) == 2


def test_a_task_that_kills_three_workers_is_final() -> None:
    pool = ScriptedPool(2, {"m0": [DIED] * 3})
    with pytest.raises(WorkerError, match=r"^task 0 after 3 tries: worker \d died$"):
        dispatcher(pool).run_all(tasks(1))
    assert len(pool.calls) == 3


def test_tries_are_counted_per_task() -> None:
    """Many tasks that fail twice each are no reason to give up."""
    pool = ScriptedPool(2, {f"m{number}": [StorageError("x"), DIED] for number in range(5)})
    assert len(dispatcher(pool).run_all(tasks(5))) == 5


def test_a_failed_task_comes_before_those_that_have_not_begun() -> None:
    pool = ScriptedPool(1, {"m0": [StorageError("x")]})
    dispatcher(pool).run_all(tasks(3))
    assert [method for _, method in pool.calls] == ["m0", "m0", "m1", "m2"]


def test_one_step_says_who_is_idle_and_what_was_lost() -> None:
    pool = ScriptedPool(2, {"m0": [DIED]})
    running = dispatcher(pool)
    first, second = tasks(2)
    running.start(0, first)
    running.start(1, second)
    assert pool.idle() == []
    (lost,) = running.collect()
    assert (lost.task, lost.worker, lost.retry, lost.value) == (first, 0, True, None)
    assert pool.idle() == [0]
    (done,) = running.collect()
    assert (done.task, done.worker, done.retry, done.value) == (second, 1, False, ("m1", 1))
    assert pool.idle() == [0, 1]


def test_a_worker_that_dies_without_a_task_is_lost_to_the_graph_and_costs_no_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = ScriptedPool(1)
    running = dispatcher(pool)
    lost: list[int] = []
    monkeypatch.setattr(running.graph, "lost", lost.append)
    running.start(0, tasks(1)[0])
    pool.order = lambda outcomes: [Outcome(0, 0, error=WorkerError("died"), worker_died=True)]
    assert running.collect() == []
    assert lost == [0]
    pool.order = lambda outcomes: outcomes[:1]
    (done,) = running.collect()
    assert done.value == ("m0", 0)


def test_a_task_that_failed_goes_to_the_worker_that_has_waited_longest() -> None:
    """Not to the process that has just been started in the place of a dead one, nor to the machine that is at fault."""
    pool = ScriptedPool(3, {"m0": [DIED, StorageError("x")]})
    dispatcher(pool).run_all(tasks(1))
    assert pool.calls == [(0, "m0"), (1, "m0"), (2, "m0")]


def test_a_node_waits_for_those_that_it_is_made_from() -> None:
    graph = Graph()
    first = graph.add(lambda: Numbered(3))
    second = graph.add(lambda: Numbered(first.value[1] + 4), after=(first,))
    pool = ScriptedPool(2)
    running = Dispatcher(pool, RetryPolicy(), lambda _: None, graph)
    assert running.run([second]) == [("m7", 7)]
    assert [kind for _, kind in pool.calls] == ["m3", "m7"]


def test_whoever_waits_for_what_cannot_start_is_told() -> None:
    """And does not wait for ever: a node behind one that is in no graph that runs."""
    graph = Graph()
    node = graph.add(lambda: Numbered(0), after=(Graph().add(lambda: Numbered(1)),))
    with pytest.raises(WorkerError, match=r"^node 0: nothing runs and nothing that it waits for can start$"):
        Dispatcher(ScriptedPool(1), RetryPolicy(), lambda _: None, graph).run([node])


def test_idle_workers_do_what_nobody_waits_for_yet() -> None:
    graph = Graph()
    wanted, other = (graph.add(lambda number=number: Numbered(number)) for number in range(2))
    pool = ScriptedPool(2)
    Dispatcher(pool, RetryPolicy(), lambda _: None, graph).run([wanted])
    assert pool.calls == [(0, "m0"), (1, "m1")]
    assert not other.done


def test_what_a_dead_worker_held_is_not_waited_for_there() -> None:
    """Two nodes use what worker 1 holds. It dies in the first: the second is then no more its own than the first is."""
    graph = Graph()
    graph.add(lambda: Numbered(0))
    held = [graph.add(lambda number=number: Numbered(number), bytes=1) for number in (1, 2)]
    gate = graph.add(lambda: Numbered(3), after=held)
    users = [
        graph.add(lambda number=number: Numbered(number), after=(gate,), uses=one)
        for number, one in zip((4, 5), held, strict=True)
    ]
    pool = ScriptedPool(2, {"m4": [DIED]})
    pool.order = lambda outcomes: [outcome for outcome in outcomes if outcome.worker == 1]
    assert Dispatcher(pool, RetryPolicy(), lambda _: None, graph).run(users) == [("m4", 4), ("m5", 5)]
    assert [kind for worker, kind in pool.calls if worker == 1] == ["m1", "m2", "m3", "m4", "m4", "m5"]
