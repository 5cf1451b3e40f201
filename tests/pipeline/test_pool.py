"""Workers under a real Ray: one embedded cluster for this file, whose GPUs are pretended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from counterweight.pipeline import cluster as heads
from counterweight.pipeline import ray_pool as module
from counterweight.pipeline.cluster import cluster
from counterweight.pipeline.place import Place
from counterweight.pipeline.policies import describe
from counterweight.pipeline.pool import Outcome, PoolSize, threads_per_worker
from counterweight.pipeline.ray_pool import RayPool
from counterweight.pipeline.ray_worker import WorkerActor
from counterweight.pipeline.run import pool_size
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError, RequestError, WorkerError
from counterweight.workers.identity import Identity, Token, identity
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.setting import Device
from counterweight.workers.workspace import Blob
from tests.models import checkpoint
from tests.patience import PATIENCE
from tests.pipeline.passing_tasks import PassOn, Receive
from tests.pipeline.tiny import actor_pids, files_of, job_of, local_path, run_local, run_on, until, write_job

SIZE = PoolSize(workers=2, cpus=1, gpus=1.0)
ROOM = PoolSize(workers=4, cpus=1, gpus=1.0)
"""Of the cluster: two workers stay, tests make others beside them."""
TRIES = 3
"""Of a test that a process is frozen for less than ten seconds, which nothing but the machine's load can keep it from."""


class Dying:
    """Stands for a process that cannot start where it is."""

    def __init__(self, *_: object) -> None:
        os._exit(1)

    def ready(self, *_: object) -> None:
        """Never comes to it."""


def test_workers_share_the_cpus_unless_the_manifest_says_otherwise() -> None:
    assert threads_per_worker(None, 2, available=range(8)) == 4
    assert threads_per_worker(None, 3, available=range(8)) == 2
    assert threads_per_worker(None, 16, available=range(8)) == 1
    assert threads_per_worker(5, 16, available=range(8)) == 5


def test_the_manifest_says_how_large_the_pool_is(tmp_path: Path) -> None:
    manifest = write_job(tmp_path)
    asked = job_of(manifest, "spec.resources={workers: 3, gpus_per_worker: 0.5, cpus_per_worker: 2}")
    assert pool_size(asked, Place.of(asked, None)) == PoolSize(workers=3, cpus=2, gpus=0.5)
    assert pool_size(asked, Place.of(asked, None)).device == "cuda"
    alone = job_of(manifest)
    for address in ("none", "local"):
        size = pool_size(alone, Place.of(alone, address))
        assert size == PoolSize(workers=1, cpus=len(os.sched_getaffinity(0)), gpus=0.0)
        assert size.device == "cpu"
    assert pool_size(alone, Place.of(alone, "auto")).cpus == 1, "of machines that are elsewhere nothing is known"


def test_a_single_worker_on_a_cpu_is_a_fork_unless_an_address_says_otherwise(tmp_path: Path) -> None:
    manifest = write_job(tmp_path)
    alone, two = job_of(manifest), job_of(manifest, "spec.resources.workers=2")
    gpu = job_of(manifest, "spec.resources.gpus_per_worker=1")
    assert not Place.of(alone, None).ray
    assert Place.of(two, None) == Place.of(gpu, None) == Place.of(alone, "local")
    assert not Place.of(two, "none").ray
    assert [Place.of(alone, address).here for address in ("none", "local", "auto", "ray://a:1")] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(RequestError, match=r"^--address none: spec\.resources\.gpus_per_worker: 1: expected 0"):
        Place.of(gpu, "none")


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    """By us: Ray itself tries for minutes, and has other words."""
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        said = f"^Ray at {address}: Connection refused: expected a running cluster$"
        with pytest.raises(WorkerError, match=said), cluster(address, SIZE):
            pass


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ours = ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS")
    before = [os.environ.get(name) for name in ours]
    with cluster(None, ROOM):
        assert [os.environ.get(name) for name in ours] == before, "what Ray was told stays in the environment"
        yield


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[RayPool]:
    notes: list[str] = []
    pool = RayPool(SIZE, expected=identity(), note=notes.append)
    full(pool)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("model")
    checkpoint("llama", root, num_hidden_layers=1)
    return root.as_uri()


class Clock:
    """Seconds that only the test lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def full(pool: RayPool) -> None:
    """Waits until every worker is there."""
    until(lambda: pool.wait(0.2) == [] and len(pool.idle()) == pool.size)


def processes(count: int) -> list[int]:
    """Of all workers here, once they are so many: those of an earlier test may be about to end."""
    until(lambda: len(actor_pids(os.getpid())) == count)
    return actor_pids(os.getpid())


def outcome_of(pool: RayPool, ticket: int) -> Outcome:
    """The next outcome, which must be the ticket's."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for outcome in pool.wait(0.2):
            assert outcome.ticket == ticket
            return outcome
    raise AssertionError(f"no outcome within {PATIENCE:.0f} s")


def test_gpus_that_are_not_there_are_pretended_and_workers_say_what_they_compute_on(pool: RayPool) -> None:
    import ray

    assert pool.first().device == "cpu"
    assert ray.cluster_resources()["GPU"] == 4
    assert ray.cluster_resources()["CPU"] == 4


def test_nothing_asked_nothing_answered(pool: RayPool) -> None:
    assert pool.wait(5.0) == []


def test_a_call_comes_back_with_its_ticket_its_worker_and_its_value(pool: RayPool, model: str) -> None:
    tickets = [pool.submit(worker, Inspect(model, ["model.norm.weight"])) for worker in (0, 1)]
    found: list[Outcome] = []
    until(lambda: len(found.__iadd__(pool.wait(0.2))) == 2)
    assert sorted((outcome.ticket, outcome.worker) for outcome in found) == [(tickets[0], 0), (tickets[1], 1)]
    for outcome in found:
        assert outcome.error is None
        assert set(outcome.value) == {"model.norm.weight"}
        assert 0 < outcome.traffic.read < 100_000


def test_an_error_raised_on_purpose_arrives_as_it_was(pool: RayPool, tmp_path: Path) -> None:
    outcome = outcome_of(pool, pool.submit(0, Inspect(tmp_path.as_uri(), ["x"])))
    assert type(outcome.error) is CheckpointError
    assert str(outcome.error).endswith("config.json: not found, expected a transformers checkpoint")
    assert not outcome.worker_died


def test_a_defect_is_one_line_and_its_traceback_is_not_lost(pool: RayPool) -> None:
    outcome = outcome_of(pool, pool.submit(1, Inspect(cast(str, 5), ["x"])))
    assert isinstance(outcome.error, AttributeError)
    assert not outcome.worker_died
    text = describe(outcome.error)
    assert text.startswith("AttributeError: ")
    assert "\n" not in text
    assert "Traceback" in str(outcome.error.__cause__) or "inspect.py" in str(outcome.error.__cause__)


def test_a_killed_worker_is_noticed_and_replaced_and_the_other_works_on(
    pool: RayPool, model: str, tmp_path: Path
) -> None:
    full(pool)
    before = processes(2)
    assert pool.room is not None
    made = [PassOn(tmp_path.as_uri(), worker + 1.0, pool.room) for worker in (0, 1)]
    hidden = [outcome_of(pool, pool.submit(worker, task)).value for worker, task in enumerate(made)]
    victim = before[0]
    os.kill(victim, signal.SIGSTOP)  # it cannot answer before it dies
    tickets = [pool.submit(worker, Inspect(model, ["model.norm.weight"])) for worker in (0, 1)]
    os.kill(victim, signal.SIGKILL)
    found: list[Outcome] = []
    while len(found) < 2:
        outcomes = pool.wait(0.2)
        for outcome in outcomes:
            # Of its next process nobody has heard yet.
            assert (outcome.worker in pool.idle()) != outcome.worker_died, (
                "a process that has not answered is given a task"
            )
        found += outcomes
    (dead,) = [outcome for outcome in found if outcome.worker_died]
    (alive,) = [outcome for outcome in found if not outcome.worker_died]
    assert {dead.ticket, alive.ticket} == set(tickets)
    assert isinstance(dead.error, WorkerError)
    assert str(dead.error).startswith(f"worker {dead.worker} on ")
    assert f"(process {victim}) died: The actor died" in str(dead.error)
    assert len(str(dead.error)) < 300, "Ray's dozen lines"
    assert "\n" not in str(dead.error)
    assert alive.error is None
    kept = outcome_of(pool, pool.submit(alive.worker, Receive(tmp_path.as_uri(), [hidden[alive.worker]])))
    assert kept.value == [64.0 * (alive.worker + 1)]
    lost = outcome_of(pool, pool.submit(alive.worker, Receive(tmp_path.as_uri(), [hidden[dead.worker]])))
    assert isinstance(lost.error, ObjectNotFoundError), "hidden states outlast their worker"
    full(pool)
    again = outcome_of(pool, pool.submit(dead.worker, Inspect(model, ["model.norm.weight"])))
    assert set(again.value) == {"model.norm.weight"}
    after = processes(2)
    assert victim not in after
    assert set(before) & set(after), "the other worker was replaced as well"


def test_hidden_states_lie_in_the_object_store_until_nobody_reads_them(pool: RayPool, tmp_path: Path) -> None:
    """And nowhere else. Who reads what is gone is told so."""
    full(pool)
    assert pool.room is not None
    assert pool.room > 1 << 20
    blobs: list[Blob] = []
    for value in (1.0, 2.0):
        made = outcome_of(pool, pool.submit(0, PassOn(tmp_path.as_uri(), value, pool.room)))
        assert made.error is None
        blobs.append(made.value)
    for worker in (0, 1):
        assert outcome_of(pool, pool.submit(worker, Receive(tmp_path.as_uri(), blobs))).value == [64.0, 128.0]
    assert not list(tmp_path.rglob("*"))
    pool.forget(blobs[:1])
    outcome = outcome_of(pool, pool.submit(1, Receive(tmp_path.as_uri(), blobs)))
    assert isinstance(outcome.error, ObjectNotFoundError)


def test_a_job_whose_hidden_states_pass_through_the_object_store_has_the_same_bytes(
    pool: RayPool, tmp_path: Path
) -> None:
    manifest = write_job(tmp_path, layers=4)
    settings = ("spec.validation=", "spec.resources.workers=2", "spec.resources.hidden_states.durable_every=0")
    published = run_on(pool, job_of(manifest, *settings, f"spec.output.uri={tmp_path / 'ray'}"))
    expected = run_local(job_of(manifest, "spec.validation=", f"spec.output.uri={tmp_path / 'here'}"))
    assert files_of(local_path(published.uri)) == files_of(local_path(expected.uri))


def test_a_worker_that_dies_before_its_first_answer_is_replaced(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "died"

    class DiesOnce(WorkerActor):
        """The first process of a worker ends while it starts."""

        def __init__(self, device: Device, threads: int, shares: bool) -> None:
            if not mark.exists():
                mark.touch()
                os._exit(1)
            super().__init__(device, threads, shares)

    monkeypatch.setattr(module, "WorkerActor", DiesOnce)
    notes: list[str] = []
    own = RayPool(PoolSize(workers=1, cpus=1, gpus=0.0), note=notes.append)
    full(own)
    assert mark.exists()
    (note,) = notes
    assert note.startswith("worker 0 is back, on ")
    own.close()


def test_a_worker_whose_processes_die_at_once_is_given_up(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WorkerActor", Dying)
    notes: list[str] = []
    pool = RayPool(PoolSize(workers=1, cpus=1, gpus=0.0), note=notes.append)
    with pytest.raises(WorkerError, match=r"none of 1 workers has answered for .*: "):
        until(lambda: pool.wait(0.2) != [])
    assert [note[:24] for note in notes] == ["worker 0 is given up: 3 "]
    pool.close()


@pytest.fixture
def clocked(ray_cluster: None) -> Iterator[tuple[RayPool, Clock]]:
    """A pool of one worker, and its clock."""
    clock = Clock()
    own = RayPool(PoolSize(workers=1, cpus=1, gpus=0.0), clock=clock)
    full(own)
    yield own, clock
    own.close()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that is stopped inside. Ray breaks a connection to one that it has not heard of for ten seconds."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def silent(pool: RayPool, clock: Clock, task: Inspect) -> Outcome:
    """Submits a task to a worker that is frozen; the outcome that comes of it, when it is due and not before."""
    ticket = pool.submit(0, task)
    clock.now += 1000.0  # in which this process did not look at the pool, and asked nobody
    for _ in range(4):
        assert pool.wait(0.05) == [], "judged before it was asked, or could have answered"
        clock.now += module.SILENT_SECONDS / 3 - 0.1
    (outcome,) = pool.wait(0.05)
    assert outcome.ticket == ticket
    return outcome


def test_a_silent_workers_task_is_another_s_and_its_own_late_answer_nobodys(
    clocked: tuple[RayPool, Clock], model: str
) -> None:
    pool, clock = clocked
    pid = pool.first().pid
    for _ in range(TRIES):
        with frozen(pid):
            outcome = silent(pool, clock, Inspect(model, ["model.norm.weight"]))
            assert pool.idle() == []
        assert outcome.worker_died
        assert f"(process {pid}) has not answered for 15 s" in str(outcome.error)
        full(pool)
        again = outcome_of(pool, pool.submit(0, Inspect(model, ["model.norm.weight"])))
        assert set(again.value) == {"model.norm.weight"}
        if pool.first().pid == pid:
            return
        pid = pool.first().pid  # it was frozen for so long that Ray gave it up
    raise AssertionError(f"a worker that was only slow was replaced, {TRIES} times")


def test_a_head_that_does_not_answer_once_is_not_gone(
    clocked: tuple[RayPool, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long this process has not looked before."""
    pool, clock = clocked
    monkeypatch.setattr(heads, "unreachable", lambda host, port: "Connection refused")
    clock.now += 1000.0
    assert pool.wait(0.0) == []
    monkeypatch.setattr(heads, "unreachable", lambda host, port: "")
    clock.now += 2.0
    assert pool.wait(0.0) == []
    monkeypatch.setattr(heads, "unreachable", lambda host, port: "Connection refused")
    clock.now += 1000.0
    assert pool.wait(0.0) == []
    clock.now += heads.HEAD_SECONDS + 1.0
    with pytest.raises(WorkerError, match=r"^Ray's head at 127\.0\.0\.\d:\d+ is gone: Connection refused$"):
        pool.wait(0.0)


def test_workers_with_other_code_are_refused(ray_cluster: None) -> None:
    other = Identity(code="0" * 64, libraries={**identity().libraries, "torch": "1.0"})
    pool = RayPool(PoolSize(workers=1, cpus=1, gpus=0.0), expected=other)
    wanted = f"would compute other bits: it has code {identity().code[:12]} .*torch .* \\(the driver has 1.0\\)"
    with pytest.raises(WorkerError, match=wanted):
        pool.first()
    pool.close()


def test_workers_that_do_not_see_the_storage_are_refused(ray_cluster: None, tmp_path: Path) -> None:
    token = Token(uri=tmp_path.as_uri(), key="seen", value=b"by the driver")
    for written in (None, b"by somebody else"):
        if written is not None:
            (tmp_path / "seen").write_bytes(written)
        pool = RayPool(PoolSize(workers=1, cpus=1, gpus=0.0), token=token)
        with pytest.raises(
            WorkerError, match=r"worker 0 on .* does not see the job's output: .*: expected storage that"
        ):
            pool.first()
        pool.close()
    (tmp_path / "seen").write_bytes(token.value)
    pool = RayPool(PoolSize(workers=1, cpus=1, gpus=0.0), token=token)
    assert pool.first().storage == ""
    pool.close()


def test_a_worker_that_no_node_has_room_for_is_told(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has 64 CPUs here: Ray itself would wait for ever."""
    monkeypatch.setattr(module, "START_SECONDS", 3.0)
    notes: list[str] = []
    waiting = RayPool(PoolSize(workers=1, cpus=64, gpus=0.0), note=notes.append)
    assert notes == [
        "the cluster has room for 0 of 1 workers: each asks for 64 CPU; nodes have 4 CPU and 4 GPU: others are waited for, "
        "up to 300 s"
    ]
    with pytest.raises(WorkerError, match=r"none of 1 workers .* each asks for 64 CPU; nodes have 4 CPU and 4 GPU$"):
        waiting.first()
    waiting.close()


def test_a_job_goes_on_with_the_workers_that_find_room(pool: RayPool, model: str) -> None:
    crowded = RayPool(PoolSize(workers=3, cpus=1, gpus=0.0))
    until(lambda: crowded.wait(0.2) == [] and len(crowded.idle()) == 2)
    assert outcome_of(crowded, crowded.submit(crowded.idle()[0], Inspect(model, ["model.norm.weight"]))).error is None
    crowded.close()
