"""Several drivers on one job: at any offsets, and one that sleeps while another finishes it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from counterweight.pipeline.artifact import DOCUMENT, Published, verify
from counterweight.workers.storage import open_store
from tests.pipeline.tiny import LocalPool, Run, files_of, job_of, local_path, run_local, write_job

FROZEN_SECONDS = 30.0
"""Longer than whatever is held for a driver: Ray's connections break after ten, a worker counts as silent after fifteen."""

WORKERS = {1: "spec.resources={workers: 1}", 2: "spec.resources={workers: 2, cpus_per_worker: 1}"}
"""Forks of the driver, and under a Ray of its own."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def undisturbed(manifest: Path) -> tuple[Published, float]:
    """The job alone, and its seconds."""
    started = time.monotonic()
    published = run_local(job_of(manifest), LocalPool(2))
    return published, time.monotonic() - started


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Of a test; what is left of them is killed at its end."""
    made: list[Run] = []
    yield made
    for run in made:
        if run.process.poll() is None:
            run.kill()


@pytest.mark.parametrize("seed", range(2))
def test_three_drivers_at_any_offsets_publish_one_artifact(
    manifest: Path, undisturbed: tuple[Published, float], tmp_path: Path, seed: int
) -> None:
    alone, seconds = undisturbed
    job = job_of(manifest, f"spec.output.uri={tmp_path}")
    offsets = [0.0, *(Random(seed).uniform(0, 1.5 * seconds) for _ in range(2))]

    def driver(offset: float) -> Published:
        time.sleep(offset)
        return run_local(job, LocalPool(2))

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(driver, offsets))
    assert len({published.uri for published in found}) == 1
    assert files_of(local_path(found[0].uri)) == files_of(local_path(alone.uri))
    assert verify(found[0].uri) == found[0].document
    assert len(list(tmp_path.rglob(DOCUMENT))) == 1


def everything(root: Path) -> dict[str, bytes]:
    """The objects that are there."""
    store = open_store(root.as_uri())
    return {info.key: store.read(info.key) for info in store.list()}


@pytest.mark.end_to_end
@pytest.mark.parametrize(("moment", "workers"), [("block 1 started", 2), ("stage assemble", 1)])
def test_a_driver_that_was_frozen_while_another_finished_the_job_changes_nothing(
    manifest: Path, undisturbed: tuple[Published, float], tmp_path: Path, runs: list[Run], moment: str, workers: int
) -> None:
    frozen = Run(manifest, "--output", str(tmp_path), "--set", WORKERS[workers])
    runs.append(frozen)
    frozen.wait_for(moment)
    os.kill(frozen.process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    other = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"), LocalPool(2))
    if workers > 1:
        time.sleep(max(0.0, FROZEN_SECONDS - (time.monotonic() - stopped)))
    published = everything(local_path(other.uri))
    pointer = (tmp_path / "tiny" / "latest.json").read_bytes()
    os.kill(frozen.process.pid, signal.SIGCONT)
    code, out, err = frozen.finish()
    assert code == 0, err
    assert "Traceback" not in err
    assert out.strip() == other.uri
    assert everything(local_path(other.uri)) == published
    assert (tmp_path / "tiny" / "latest.json").read_bytes() == pointer
    assert len(list(tmp_path.rglob(DOCUMENT))) == 1
    assert published.keys() == everything(local_path(undisturbed[0].uri)).keys()
    assert verify(other.uri) == other.document
