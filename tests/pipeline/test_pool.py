"""Workers under a real Ray: one embedded cluster for this file, whose GPUs are pretended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from counterweight.pipeline import pool as module
from counterweight.pipeline.policies import describe
from counterweight.pipeline.pool import Outcome, PoolSize, RayPool, cluster, threads_per_worker
from counterweight.pipeline.run import pool_size
from counterweight.workers.errors import CheckpointError, RequestError, WorkerError
from counterweight.workers.tasks.inspect import Inspect
from tests.models import checkpoint
from tests.patience import PATIENCE
from tests.pipeline.tiny import actor_pids, job_of, until, write_job

SIZE = PoolSize(workers=2, cpus=1, gpus=1.0)


def test_workers_share_the_cpus_unless_the_manifest_says_otherwise() -> None:
    assert threads_per_worker(None, 2, available=range(8)) == 4
    assert threads_per_worker(None, 3, available=range(8)) == 2
    assert threads_per_worker(None, 16, available=range(8)) == 1
    assert threads_per_worker(5, 16, available=range(8)) == 5


def test_the_manifest_says_how_large_the_pool_is(tmp_path: Path) -> None:
    manifest = write_job(tmp_path)
    asked = job_of(manifest, "spec.resources={workers: 3, gpus_per_worker: 0.5, cpus_per_worker: 2}")
    assert pool_size(asked, None) == PoolSize(workers=3, cpus=2, gpus=0.5)
    assert pool_size(asked, None).device == "cuda"
    alone = job_of(manifest)
    assert pool_size(alone, "local") == PoolSize(workers=1, cpus=len(os.sched_getaffinity(0)), gpus=0.0)
    assert pool_size(alone, "local").device == "cpu"


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    started = time.monotonic()
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(WorkerError, match=f"^Ray at {address}: Connection refused"), cluster(address, SIZE):
            pass
    assert time.monotonic() - started < 30, "Ray itself tries for minutes"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ours = ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS")
    before = [os.environ.get(name) for name in ours]
    with cluster(None, SIZE):
        assert [os.environ.get(name) for name in ours] == before, "what Ray was told stays in the environment"
        yield


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[RayPool]:
    pool = RayPool(SIZE)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("model")
    checkpoint("llama", root, num_hidden_layers=1)
    return root.as_uri()


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

    assert pool.devices() == ["cpu", "cpu"]
    assert ray.cluster_resources()["GPU"] == 2
    assert ray.cluster_resources()["CPU"] == 2


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


def test_a_killed_worker_is_noticed_and_replaced_and_the_other_works_on(pool: RayPool, model: str) -> None:
    pool.devices()
    before = actor_pids(os.getpid())
    assert len(before) == 2
    victim = before[0]
    os.kill(victim, signal.SIGSTOP)  # it cannot answer before it dies
    tickets = [pool.submit(worker, Inspect(model, ["model.norm.weight"])) for worker in (0, 1)]
    os.kill(victim, signal.SIGKILL)
    found: list[Outcome] = []
    until(lambda: len(found.__iadd__(pool.wait(0.2))) == 2)
    (dead,) = [outcome for outcome in found if outcome.worker_died]
    (alive,) = [outcome for outcome in found if not outcome.worker_died]
    assert {dead.ticket, alive.ticket} == set(tickets)
    assert isinstance(dead.error, WorkerError)
    assert str(dead.error).startswith(f"worker {dead.worker} died: ")
    assert "\n" not in str(dead.error)
    assert alive.error is None
    pool.restart(dead.worker)
    again = outcome_of(pool, pool.submit(dead.worker, Inspect(model, ["model.norm.weight"])))
    assert set(again.value) == {"model.norm.weight"}
    after = actor_pids(os.getpid())
    assert victim not in after
    assert len(after) == 2
    assert set(before) & set(after), "the other worker was replaced as well"


def test_workers_that_do_not_start_are_given_up(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has 64 CPUs here: Ray itself would wait for ever."""
    monkeypatch.setattr(module, "START_SECONDS", 3.0)
    waiting = RayPool(PoolSize(workers=1, cpus=64, gpus=0.0))
    with pytest.raises(WorkerError, match="1 workers did not start within 3 s"):
        waiting.devices()
    waiting.close()


def test_a_running_cluster_that_cannot_hold_the_workers_is_refused_at_once(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    manifest = write_job(tmp_path)
    command = [sys.executable, "-m", "counterweight.pipeline.cli", "run", str(manifest), "--address", address]
    resources = "spec.resources={workers: 3, gpus_per_worker: 1, cpus_per_worker: 1}"
    ran = subprocess.run([*command, "--set", resources], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.returncode == RequestError.exit_code, ran.stderr
    assert ran.stdout == ""
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: spec.resources: asks for 3 CPU and 3 GPU: the cluster has 2 CPU, 2 GPU"]
    assert not (tmp_path / "out" / "_work").exists()
