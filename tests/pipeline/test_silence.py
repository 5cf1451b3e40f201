"""A job of which nothing is heard ends, on a pool that never answers and a clock that the pool moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from counterweight.pipeline.awake import AWAKE_SECONDS
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.events import EventLog
from counterweight.pipeline.graph import Graph
from counterweight.pipeline.opening import open_job
from counterweight.pipeline.policies import RetryPolicy
from counterweight.pipeline.pool import START_SECONDS, Outcome
from counterweight.pipeline.silence import Silence
from counterweight.workers.context import TaskContext
from counterweight.workers.errors import WorkerError
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.files import Checksum
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.pass_through import PassThrough
from counterweight.workers.tasks.patience import BASE_SECONDS, patience
from counterweight.workers.tasks.sample import Sample
from counterweight.workers.tasks.setting import Device, Setting
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob
from tests.pipeline.tiny import Events, LocalPool, job_of, run_local, write_job


@dataclass(frozen=True)
class Long(Task[None]):
    """A task that says how long it may take."""

    called: str
    seconds: float
    kind = "long"

    @property
    def name(self) -> str:
        return self.called

    @property
    def patience(self) -> float:
        return self.seconds

    def run(self, context: TaskContext) -> None:
        raise AssertionError("nobody runs it")


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class MutePool:
    """Takes tasks and says nothing of them, or of each after so many seconds. present: whether workers are there."""

    def __init__(
        self, clock: Clock, size: int, *, present: bool = True, answers: float | None = None, step: float = 0.0
    ) -> None:
        self.size, self.threads = size, 1
        self.room: int | None = 0
        self._clock, self._answers, self._step = clock, answers, step
        self._idle = list(range(size)) if present else []
        self._taken: dict[int, tuple[int, float]] = {}

    def idle(self) -> list[int]:
        return list(self._idle)

    def submit(self, worker: int, task: Task[object]) -> int:
        self._idle.remove(worker)
        ticket = len(self._taken) + 1
        self._taken[ticket] = (worker, self._clock())
        return ticket

    def wait(self, seconds: float) -> list[Outcome]:
        self._clock.now += max(seconds, self._step)
        if self._answers is None:
            return []
        over = [t for t, (_, since) in self._taken.items() if 0 <= self._clock() - since - self._answers < seconds]
        self._idle += [self._taken[ticket][0] for ticket in over]
        return [Outcome(ticket, self._taken[ticket][0]) for ticket in over]

    def forget(self, unread: Sequence[Blob]) -> None:
        raise AssertionError("nothing is passed on")

    def close(self) -> None:
        return None


def run(pool: MutePool, clock: Clock, tasks: Sequence[Task[None]]) -> None:
    Dispatcher(pool, RetryPolicy(), lambda _: None, Graph(), clock).run_all(tasks)


def test_a_task_that_never_comes_back_ends_the_job_after_its_patience() -> None:
    clock = Clock()
    text = (
        r"^no task has begun or come back for 1 min 40 s, and 1 min 40 s is the most that it may take: worker 0 is on block 3 "
        r"for 1 min 40 s, worker 1 is idle; waited for: block 3$"
    )
    with pytest.raises(WorkerError, match=text) as caught:
        run(MutePool(clock, 2), clock, [Long("block 3", 100.0)])
    assert clock.now == pytest.approx(1100, abs=1)
    assert caught.value.exit_code == 4


def test_the_most_patient_of_those_that_run_is_waited_for() -> None:
    clock = Clock()
    tasks = [Long("one", 100.0), Long("two", 300.0), Long("three", 9000.0)]
    with pytest.raises(
        WorkerError, match=r"worker 0 is on one for 5 min 00 s, worker 1 is on two for 5 min 00 s; .*: one, two, node 2"
    ):
        run(MutePool(clock, 2), clock, tasks)
    assert clock.now == pytest.approx(1300, abs=1)


def test_whatever_happens_breaks_the_silence() -> None:
    """Ten tasks of 90 seconds each on one worker: none is over its patience of 100, all together are."""
    clock = Clock()
    run(MutePool(clock, 1, answers=90.0), clock, [Long(str(number), 100.0) for number in range(10)])
    assert clock.now == pytest.approx(1900, abs=5)


def test_workers_that_never_come_end_the_job_too_where_the_pool_does_not() -> None:
    clock = Clock()
    with pytest.raises(WorkerError, match=r"no worker is there; waited for: node 0, node 1$"):
        run(MutePool(clock, 2, present=False), clock, [Long("one", 1.0), Long("two", 1.0)])
    assert clock.now == pytest.approx(1000 + BASE_SECONDS + START_SECONDS, abs=1)


def test_time_in_which_the_driver_itself_was_stopped_does_not_count() -> None:
    clock = Clock()
    silence = Silence(clock)
    clock.now += 1_000_000.0
    silence.check([], [], [])
    pool = MutePool(clock, 1, step=50.0)
    with pytest.raises(WorkerError):
        run(pool, clock, [Long("one", 100.0)])
    assert clock.now == pytest.approx(1_001_000 + 50 * (100 / AWAKE_SECONDS + 1), abs=1)


def test_of_many_that_are_waited_for_the_first_are_named() -> None:
    clock = Clock()
    with pytest.raises(WorkerError, match=r"waited for: 0, node 1, node 2, node 3, node 4 and 15 more$"):
        run(MutePool(clock, 1), clock, [Long(str(number), 1.0) for number in range(20)])


# -- what tasks say of themselves -----------------------------------------------------------------------------------


def block(device: Device = "cpu", *, bytes: int = 0, flops: int = 0, hidden: int = 0) -> float:
    setting = Setting(source="file:/a", config={}, workspace="file:/b", compute_dtype="float32", device=device)
    inputs = (Blob(sha256="a" * 64, size=hidden),)
    spec = BlockSpec(
        setting=setting,
        index=0,
        tensors={},
        inputs=inputs,
        recipe={},
        propagate="original",
        bytes=bytes,
        flops=flops,
    )
    return Compress(block=spec).patience


def test_a_block_is_given_time_by_its_size() -> None:
    assert block() == BASE_SECONDS
    assert block(flops=10**13) - BASE_SECONDS == pytest.approx(1e5)
    assert block("cuda", flops=10**13) - BASE_SECONDS == pytest.approx(100)
    assert block(bytes=10**9) - BASE_SECONDS == pytest.approx(100)
    assert block(hidden=10**9) - BASE_SECONDS == pytest.approx(200)  # read and written


def test_other_tasks_are_given_time_by_their_bytes() -> None:
    assert Inspect(source="file:/a", names=(), bytes=10**9).patience == patience(bytes=10**9) == BASE_SECONDS + 100
    assert Checksum("file:/a", "x", 10**9).patience == BASE_SECONDS + 100


def test_a_task_has_to_say_how_long_it_may_take() -> None:
    @dataclass(frozen=True)
    class Unstated(Task[None]):
        kind = "unstated"
        name = "unstated"

        def run(self, context: TaskContext) -> None:
            return None

    with pytest.raises(TypeError, match=r"abstract.*patience"):
        Unstated()  # type: ignore[abstract]


def test_what_lies_outside_the_blocks_is_given_time_by_its_bytes_and_its_rotation() -> None:
    setting = Setting(source="file:/a", config={}, workspace="file:/b", compute_dtype="float32", device="cpu")
    kept = PassThrough(setting=setting, tensors={"a": "0"}, bytes=10**9, flops=10**10)
    assert kept.patience == BASE_SECONDS + 100 + 100
    embed = Embed(setting=setting, tokens=Blob(sha256="a" * 64, size=4), tensor=("a", "0"), bytes=10**9, flops=10**10)
    assert embed.patience == BASE_SECONDS + 100 + 100


def test_tokens_of_the_models_own_are_given_time_by_their_number_and_the_device() -> None:
    def sampled(device: Device) -> float:
        return Sample(
            source="file:/a",
            compute_dtype="bfloat16",
            sequences=10,
            length=100,
            temperature=1.0,
            seed=0,
            parameters=10**9,
            device=device,
        ).patience

    assert sampled("cpu") == BASE_SECONDS + 4 * 100 + 2e12 / 1e8
    assert sampled("cuda") == BASE_SECONDS + 4 * 100 + 2e12 / 1e11


@pytest.mark.parametrize("overrides", [(), ("spec.recipe.transforms=[{kind: rotation}]",)], ids=["plain", "rotated"])
def test_tasks_of_a_job_know_their_sizes(overrides: Sequence[str], tmp_path: Path) -> None:
    pool = LocalPool()
    run_local(job_of(write_job(tmp_path, layers=1), *overrides), pool)
    tasks = [task for _, task in pool.calls]
    assert {task.kind for task in tasks} >= {
        "inspect",
        "embed",
        "forward",
        "block",
        "keep",
        "copy",
        "join",
        "checksum",
        "evaluate",
    }
    assert all(BASE_SECONDS < task.patience < BASE_SECONDS + 60 for task in tasks)


def test_a_model_that_writes_its_own_tokens_is_given_time_for_it(tmp_path: Path) -> None:
    pool = LocalPool()
    job = job_of(write_job(tmp_path, layers=1), "spec.calibration.source={kind: model}")
    with EventLog(Events()) as log:
        open_job(job, pool, log, here=True)
    pool.close()
    (task,) = [task for _, task in pool.calls if task.kind == "sample"]
    assert BASE_SECONDS < task.patience < BASE_SECONDS + 60
