"""Workers as forks of this process: what comes back, what is noticed, and what a fork must not share with its parent."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

from counterweight.pipeline.forked_pool import ForkedPool
from counterweight.pipeline.policies import Failure, RetryPolicy, Verdict, describe
from counterweight.pipeline.pool import STARTS, Outcome, PoolSize
from counterweight.workers.errors import CheckpointError, OutOfMemoryError, WorkerError
from counterweight.workers.storage.outages import OUTAGES
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.task import Task
from tests.models import checkpoint
from tests.pipeline.tiny import actor_pids, alive, memory_of, until


@dataclass(frozen=True)
class Does(Task[Any]):
    """Something in the worker's process."""

    kind: ClassVar[str] = "does"
    what: str = "pid"

    @property
    def name(self) -> str:
        return self.what

    @property
    def patience(self) -> float:
        return 60.0

    def run(self, context: object) -> Any:
        if self.what == "print":
            print("on stdout", flush=True)
            os.system("echo from a child; echo and on stderr >&2")
        elif self.what == "die":
            print("the last word", file=sys.stderr, flush=True)
            os._exit(3)
        elif self.what == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.what == "wait for storage":
            OUTAGES.begins("bucket", "HTTP status 503", 60)
        elif self.what == "wait for a minute":
            time.sleep(60)
        elif self.what == "wait for a thread that got no memory":
            threading._start_new_thread = lambda *_: 0  # type: ignore[attr-defined]
            threading.Thread(target=print).start()
        elif self.what == "ask for more memory than there is":
            limit = memory_of(os.getpid(), "VmSize") + (16 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            torch.empty(1 << 30)
        elif self.what == "raise what does not travel":
            raise DoesNotTravelError("a", "b")
        return os.getpid()


class DoesNotTravelError(Exception):
    """Pickles, and cannot be made again from what was pickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def pool(notes: list[str]) -> Iterator[ForkedPool]:
    pool = ForkedPool(PoolSize(workers=2, cpus=1, gpus=0.0), note=notes.append)
    full(pool)
    yield pool
    pool.close()
    assert actor_pids(os.getpid()) == []


def full(pool: ForkedPool) -> None:
    until(lambda: pool.wait(0.2) == [] and len(pool.idle()) == pool.size)


def outcomes_of(pool: ForkedPool, count: int = 1) -> list[Outcome]:
    found: list[Outcome] = []
    until(lambda: len(found.__iadd__(pool.wait(0.2))) == count)
    return found


def done(pool: ForkedPool, what: str) -> Outcome:
    ticket = pool.submit(0, Does(what))
    (outcome,) = outcomes_of(pool)
    assert outcome.ticket == ticket
    return outcome


def test_each_worker_is_a_process_of_its_own_that_says_who_it_is(pool: ForkedPool) -> None:
    report = pool.first()
    assert report.device == "cpu"
    assert report.pid in actor_pids(os.getpid())
    tickets = [pool.submit(worker, Does()) for worker in (0, 1)]
    assert pool.idle() == []
    found = outcomes_of(pool, 2)
    assert sorted((outcome.ticket, outcome.worker) for outcome in found) == [(tickets[0], 0), (tickets[1], 1)]
    assert sorted(outcome.value for outcome in found) == actor_pids(os.getpid())
    with pytest.raises(ValueError, match="expected an idle one"):
        pool.submit(0, Does()), pool.submit(0, Does())
    outcomes_of(pool)


def test_a_real_task_comes_back_with_its_value_and_an_error_as_it_was_raised(pool: ForkedPool, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    pool.submit(0, Inspect((tmp_path / "model").as_uri(), ["model.norm.weight"]))
    (outcome,) = outcomes_of(pool)
    assert set(cast(dict[str, object], outcome.value)) == {"model.norm.weight"}
    assert 0 < outcome.traffic.read < 100_000
    assert outcome.traffic.written == 0
    pool.submit(1, Inspect(tmp_path.as_uri(), ["x"]))
    (outcome,) = outcomes_of(pool)
    assert type(outcome.error) is CheckpointError
    assert str(outcome.error).endswith("config.json: not found, expected a transformers checkpoint")
    assert not outcome.worker_died


def test_a_defect_is_one_line_and_its_traceback_is_not_lost(pool: ForkedPool) -> None:
    pool.submit(0, Inspect(cast(str, 5), ["x"]))
    (outcome,) = outcomes_of(pool)
    assert isinstance(outcome.error, AttributeError)
    assert "\n" not in describe(outcome.error)
    assert "inspect.py" in outcome.error.__notes__[0]


def test_an_error_that_does_not_travel_is_told_in_words(pool: ForkedPool) -> None:
    outcome = done(pool, "raise what does not travel")
    assert type(outcome.error) is WorkerError
    assert str(outcome.error) == "DoesNotTravelError: a and b"


def test_a_worker_that_dies_is_replaced_and_the_other_works_on(pool: ForkedPool) -> None:
    before = actor_pids(os.getpid())
    pool.submit(0, Does("die"))
    pool.submit(1, Does())
    found = {outcome.worker: outcome for outcome in outcomes_of(pool, 2)}
    assert found[0].worker_died
    assert isinstance(found[0].error, WorkerError)
    assert str(found[0].error).startswith("worker 0 (process ")
    assert str(found[0].error).endswith(" died: exit code 3: the last word")
    assert found[1].error is None
    full(pool)
    after = actor_pids(os.getpid())
    assert len(after) == 2
    assert len(set(before) & set(after)) == 1
    assert done(pool, "pid").value in after


def test_a_worker_that_is_killed_while_idle_or_busy_is_noticed(pool: ForkedPool) -> None:
    for victim in actor_pids(os.getpid()):
        os.kill(victim, signal.SIGSTOP)
    tickets = [pool.submit(worker, Does()) for worker in (0, 1)]
    for victim in actor_pids(os.getpid()):
        os.kill(victim, signal.SIGKILL)
    found = outcomes_of(pool, 2)
    assert {outcome.ticket for outcome in found} == set(tickets)
    assert all("killed by SIGKILL" in str(outcome.error) and outcome.worker_died for outcome in found)
    full(pool)
    os.kill(actor_pids(os.getpid())[0], signal.SIGKILL)
    (lost,) = outcomes_of(pool, 1)
    assert (lost.ticket, lost.worker_died) == (0, True), "what it had in memory is lost"
    full(pool)


def test_workers_that_die_before_they_answer_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterweight.pipeline.forked_pool.WorkerProcess", lambda *_: os._exit(7))
    pool = ForkedPool(PoolSize(workers=1, cpus=1, gpus=0.0))
    with pytest.raises(WorkerError, match=rf"died: exit code 7: {STARTS} processes in a row before they answered"):
        pool.first()
    pool.close()


def test_memory_that_is_refused_is_one_line_and_tried_again(pool: ForkedPool) -> None:
    outcome = done(pool, "ask for more memory than there is")
    assert type(outcome.error) is OutOfMemoryError
    assert str(outcome.error).startswith("out of memory: ")
    assert "4294967296 bytes" in str(outcome.error)
    assert not outcome.worker_died
    assert RetryPolicy().judge(Failure(outcome.error, worker_died=False), 1) is Verdict.RETRY
    assert done(pool, "pid").error is None


def test_a_worker_that_waits_for_a_thread_that_never_begins_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does where an address space is limited and a new thread's first frame finds no room."""
    monkeypatch.setattr("counterweight.workers.process.LOOK_SECONDS", 0.05)
    pool = ForkedPool(PoolSize(workers=1, cpus=1, gpus=0.0))
    full(pool)
    try:
        outcome = done(pool, "wait for a thread that got no memory")
        assert outcome.worker_died
        assert str(outcome.error).endswith("exit code 75: out of memory: a thread could not begin")
    finally:
        pool.close()


def test_a_worker_that_is_stopped_for_long_is_ended_and_replaced(notes: list[str]) -> None:
    now = 0.0
    pool = ForkedPool(PoolSize(workers=2, cpus=1, gpus=0.0), note=notes.append, clock=lambda: now)
    full(pool)
    try:
        stopped = pool.first().pid
        tickets = [pool.submit(worker, Does("wait for a minute")) for worker in (0, 1)]
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        assert pool.wait(0) == []
        now += 9.0
        assert pool.wait(0) == []  # it may be for a moment
        now += 9.0
        (outcome,) = outcomes_of(pool)
        assert outcome.ticket in tickets
        assert outcome.worker_died
        assert f"(process {stopped}) died: killed by SIGKILL" in str(outcome.error)
        assert notes == [f"worker {outcome.worker} (process {stopped}) was stopped for 15 s: it is ended"]
        until(lambda: pool.wait(0.2) == [] and pool.idle() == [outcome.worker])
    finally:
        pool.close()


def test_a_worker_that_was_stopped_with_its_driver_goes_on(notes: list[str]) -> None:
    now = 0.0
    pool = ForkedPool(PoolSize(workers=1, cpus=1, gpus=0.0), note=notes.append, clock=lambda: now)
    full(pool)
    try:
        os.kill(pool.first().pid, signal.SIGSTOP)
        now += 3600.0  # in which nobody looked
        assert pool.wait(0) == []
        os.kill(pool.first().pid, signal.SIGCONT)
        assert done(pool, "pid").value == pool.first().pid
        assert notes == []
    finally:
        pool.close()


def test_what_workers_print_is_not_the_drivers(pool: ForkedPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert done(pool, "print").error is None
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_of_the_terminal_is_for_the_driver(pool: ForkedPool) -> None:
    pid = done(pool, "pid").value
    assert done(pool, "interrupt").value == pid


def test_what_a_worker_waits_for_is_told(pool: ForkedPool, notes: list[str]) -> None:
    done(pool, "wait for storage")
    assert notes == ["worker 0: bucket is away (HTTP status 503): it is waited for, up to 60 s"]


def test_workers_die_with_their_driver(tmp_path: Path) -> None:
    """Killed, so that it cannot tell them."""
    script = tmp_path / "driver.py"
    script.write_text(
        "from counterweight.pipeline.forked_pool import ForkedPool\n"
        "from counterweight.pipeline.pool import PoolSize\n"
        "import os, time\n"
        "pool = ForkedPool(PoolSize(workers=2, cpus=1, gpus=0.0))\n"
        "while len(pool.idle()) < 2: pool.wait(0.2)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        workers = actor_pids(driver.pid)
        assert len(workers) == 2
        driver.kill()
    until(lambda: not any(map(alive, workers)))


def test_a_gpu_is_not_for_a_fork() -> None:
    with pytest.raises(ValueError, match="gpus: 1: expected 0"):
        ForkedPool(PoolSize(workers=1, cpus=1, gpus=1))
