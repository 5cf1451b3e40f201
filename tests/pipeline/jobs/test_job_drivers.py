"""What drivers say of themselves: devices that they have, jobs that they leave to others, and who is gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterweight.pipeline.cli import main
from counterweight.pipeline.jobs.drive import Driver, Enough, until_ended
from counterweight.pipeline.jobs.drivers import ANNOUNCE_SECONDS, Announcer, drivers, gpus_here, lacks, obstacle
from counterweight.pipeline.jobs.lease import cancel, delete, take
from counterweight.pipeline.jobs.logs import LogReader
from counterweight.pipeline.jobs.queue import Limits
from counterweight.pipeline.jobs.record import JobRecord, record_of
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.jobs.submit import submit_job
from counterweight.workers.errors import RequestError
from counterweight.workers.storage.file import FileStore
from tests.pipeline.jobs.memory import MemoryStore, manifest, record, submitted
from tests.pipeline.jobs.theatre import Theatre


def on_gpus(name: str, gpus: float = 1, priority: int = 0) -> JobRecord:
    """A job whose workers need GPUs."""
    return record_of(manifest(name, spec__resources__gpus_per_worker=gpus), priority=priority)


def test_a_driver_leaves_jobs_to_those_that_have_the_devices() -> None:
    theatre = Theatre()
    jobs = theatre.jobs
    jobs.set_limits(Limits(concurrency=1))
    first, second, third = on_gpus("first", priority=9), record("second"), on_gpus("third", 0.5)
    for one in (first, second, third):
        jobs.submit(one)
    driver = theatre.driver()
    driver.gpus = 0
    driver.work(until_ended(second.id))  # which is not held up by the one before it
    assert [id for id, _ in theatre.attempts] == [second.id]
    (told,) = {note for note in theatre.notes if note.startswith("left to other drivers: ")}
    assert all(part in told for part in (first.id, third.id, "GPU: there are none"))
    driver.gpus = 1
    driver.work(until_ended(first.id, third.id))
    assert theatre.states() == [State.SUCCEEDED] * 3


def test_a_lapsed_job_on_gpus_keeps_its_place_and_is_not_taken_over_by_a_driver_without() -> None:
    theatre = Theatre()
    jobs = theatre.jobs
    jobs.set_limits(Limits(concurrency=1))
    lost, waits = on_gpus("lost"), record("waits")
    for one in (lost, waits):
        jobs.submit(one)
    assert take(jobs, lost.id, "dead", 15) is not None
    theatre.store.advance(60)
    driver = theatre.driver()
    driver.gpus = 0
    assert driver._next(jobs.all()) is None
    assert {job.id: job.state for job in jobs.all()} == {lost.id: State.LAPSED, waits.id: State.QUEUED}


def test_a_job_that_nobody_who_stands_by_can_run_says_so() -> None:
    store = MemoryStore()
    jobs, needs = JobStore(store), manifest("tiny", spec__resources__gpus_per_worker=2)
    assert obstacle(needs, drivers(jobs)) is None, "one may come"
    for name, gpus in (("a", 0), ("b", 1)):
        Announcer(jobs, name, gpus, said="waiting: 503 SlowDown").tick()
    told = obstacle(needs, drivers(jobs))
    assert told == "no driver can run it: a worker needs 2 GPUs: there are none, a worker needs 2 GPUs: there is 1"
    assert obstacle(manifest("tiny"), drivers(jobs)) is None
    assert [one.record.said for one in drivers(jobs)] == ["waiting: 503 SlowDown"] * 2
    cluster = Announcer(jobs, "cluster", None)
    cluster.tick()
    assert obstacle(needs, drivers(jobs)) is None
    cluster.close()
    assert obstacle(needs, drivers(jobs)) == told
    store.advance(3 * ANNOUNCE_SECONDS + 1)
    assert drivers(jobs) == []


@pytest.mark.parametrize(("gpus", "needed", "lack"), [(None, 8, False), (1, 0.5, False), (0, 0.5, True), (1, 2, True)])
def test_what_devices_are_enough_for(gpus: int | None, needed: float, lack: bool) -> None:
    assert bool(lacks(manifest("tiny", spec__resources__gpus_per_worker=needed), gpus)) == lack
    assert not lacks(manifest("tiny"), gpus)


def test_gpus_are_those_that_are_visible(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert gpus_here({}, tmp_path) == 2
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert gpus_here({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0
    assert gpus_here({}, tmp_path / "none") == 0


class TestADeletedJob:
    def test_is_out_of_sight_and_its_manifest_another_job(self) -> None:
        theatre = Theatre()
        jobs = theatre.jobs
        (id,) = submitted(jobs, "tiny")
        theatre.driver().work(until_ended(id))
        assert list(LogReader(jobs, id).lines())
        job = delete(jobs, id, "by me")
        assert (job.state, job.ended is not None) == (State.DELETED, True)
        assert not list(LogReader(jobs, id).lines())
        assert delete(jobs, id).journal == job.journal
        again, created = submit_job(jobs, manifest("tiny"))
        assert (again.id, created, again.state) == (f"{id}-1", True, State.QUEUED)
        assert submit_job(jobs, manifest("tiny"))[1] is False
        assert take(jobs, id, "a") is None

    def test_has_to_be_at_its_end(self) -> None:
        jobs = JobStore(MemoryStore())
        (id,) = submitted(jobs, "tiny")
        with pytest.raises(RequestError, match="expected it to be cancelled first"):
            delete(jobs, id)
        cancel(jobs, id)
        assert delete(jobs, id).state is State.DELETED

    def test_by_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        jobs = JobStore(FileStore(tmp_path))
        (id,) = submitted(jobs, "tiny")
        cancel(jobs, id)
        assert main(["delete", id, "--store", str(tmp_path)]) == 0
        assert main(["list", "--store", str(tmp_path), "--json"]) == 0
        assert "[]" in capsys.readouterr().out
        assert main(["list", "--store", str(tmp_path), "--state", "deleted", "--json"]) == 0
        assert [one["id"] for one in json.loads(capsys.readouterr().out)] == [id]


def test_work_announces_its_devices_and_takes_itself_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int | None] = []

    def work(self: Driver, enough: Enough) -> None:
        self.meanwhile()
        seen.extend(one.record.gpus for one in drivers(self.jobs))

    monkeypatch.setattr("counterweight.pipeline.jobs.drive.Driver.work", work)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for options in ([], ["--gpus", "0"], ["--address", "auto"], ["--address", "local"]):
        assert main(["work", "--idle", "--store", str(tmp_path), *options]) == 0, capsys.readouterr().err
    assert seen == [2, 0, None, 2]
    assert drivers(JobStore(FileStore(tmp_path))) == []
