"""Jobs with real drivers, each with a Ray of its own: one is killed and another takes over; one is cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterweight.pipeline.jobs.lease import cancel
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.jobs.submit import submit_job
from counterweight.pipeline.reaper import descendants
from counterweight.workers.storage.file import FileStore
from tests.pipeline.tiny import alive, files_of, job_of, local_path, run_local, until, write_job

pytestmark = pytest.mark.end_to_end


SECRET = b"wJalrXUtnFEMI-K7MDENG"
"""In the environment of every driver, under names that matter."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of which much is left when its first block is done."""
    path = write_job(tmp_path_factory.mktemp("job"), layers=4)
    path.write_text(path.read_text().replace("sequences: 12,", "sequences: 256,"))
    text = path.parent / "calibration.txt"
    text.write_text(" ".join([text.read_text()] * 20))
    return path


class Drivers:
    """Processes that work on the jobs of a store."""

    def __init__(self, root: Path) -> None:
        self.jobs = JobStore(FileStore(root / "store"))
        self._started: list[subprocess.Popen[bytes]] = []
        self._log = (root / "drivers.log").open("ab")

    def start(self, id: str) -> subprocess.Popen[bytes]:
        """A driver that stays until the job is at its end."""
        command = [*("-m", "counterweight.pipeline.cli", "work", "--store", self.jobs.store.uri, "--until", id)]
        secrets = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "COUNTERWEIGHT_PASSWORD"), SECRET.decode())
        process = subprocess.Popen(
            [sys.executable, *command], stderr=self._log, start_new_session=True, env={**os.environ, **secrets}
        )
        self._started.append(process)
        return process

    def said(self, id: str) -> str:
        infos = list(self.jobs.store.list(f"_logs/{id}/"))
        return "".join(self.jobs.store.read(info.key).decode() for info in infos)

    def stop(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._log.close()


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Drivers]:
    drivers = Drivers(tmp_path)
    yield drivers
    drivers.stop()


def run_of(driver: int) -> int:
    """The process of `counterweight run` that a driver started."""
    below = [pid for pid, _ in descendants(driver)]
    (run,) = [pid for pid in below if int(_stat(pid)[1]) == driver and "run" in _command(pid)]
    return run


def _command(pid: int) -> list[str]:
    return (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")


def _stat(pid: int) -> list[str]:
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process that is stopped was sent a signal."""
    for line in (Path("/proc") / str(pid) / "status").read_text().splitlines():
        if line.startswith("ShdPnd:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    raise AssertionError("no ShdPnd in the status of a process")


def records(output: Path) -> set[str]:
    """Names of the records of finished blocks."""
    return {path.name for path in (output / "_work" / "commits" / "block").glob("*.json")}


def test_a_driver_that_is_killed_is_taken_over_and_the_bytes_are_those_of_an_undisturbed_run(
    drivers: Drivers, manifest: Path, tmp_path: Path
) -> None:
    expected = files_of(local_path(run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'expected'}")).uri))
    job, _ = submit_job(drivers.jobs, job_of(manifest, f"spec.output.uri={tmp_path / 'out'}"))
    first = drivers.start(job.id)
    until(lambda: bool(records(tmp_path / "out")))
    second = drivers.start(job.id)
    until(lambda: drivers.jobs.get(job.id).state is State.RUNNING)
    below = [pid for pid, _ in descendants(first.pid)]
    assert below
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    until(lambda: not any(map(alive, below)))
    before = records(tmp_path / "out")
    assert second.wait() == 0
    ended = drivers.jobs.get(job.id)
    assert (ended.state, ended.failures[Cause.LAPSED] >= 1) == (State.SUCCEEDED, True)
    assert ended.ended is not None
    assert ended.ended.artifact is not None
    assert files_of(local_path(ended.ended.artifact)) == expected
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_bytes(), path
    assert before
    assert before <= records(tmp_path / "out")
    leased = [dated.at for dated in ended.journal[:2]]
    assert (leased[1] - leased[0]).total_seconds() > 0
    assert json.loads((tmp_path / "store" / "_jobs" / job.id / "journal" / "0001.json").read_text())["kind"] == "leased"


def test_a_cancel_ends_every_process_and_keeps_what_is_finished(
    drivers: Drivers, manifest: Path, tmp_path: Path
) -> None:
    document = job_of(manifest, f"spec.output.uri={tmp_path / 'out'}")
    job, _ = submit_job(drivers.jobs, document)
    driver = drivers.start(job.id)
    until(lambda: bool(records(tmp_path / "out")))
    run = run_of(driver.pid)
    os.kill(run, signal.SIGSTOP)  # it does not finish before it is told
    below = [pid for pid, _ in descendants(driver.pid)]
    cancel(drivers.jobs, job.id)
    until(lambda: pending(run, signal.SIGTERM))
    os.kill(run, signal.SIGCONT)
    driver.wait()
    until(lambda: not any(map(alive, below)))
    cancelled = drivers.jobs.get(job.id)
    assert cancelled.state is State.CANCELLED, drivers.said(job.id)
    before = records(tmp_path / "out")
    assert before
    again, created = submit_job(drivers.jobs, document, again=True)
    assert created
    assert drivers.start(again.id).wait() == 0
    assert drivers.jobs.get(again.id).state is State.SUCCEEDED
    assert f"{len(before)} of 4 blocks were finished before and are reused" in drivers.said(again.id)
