"""Jobs in real stores: files, and a server that speaks S3. Nothing waits for a lease to lapse: it lapses at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counterweight.pipeline.cli import main
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import Standing, cancel, take
from counterweight.pipeline.jobs.logs import LogReader
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.jobs.submit import submit_job
from counterweight.pipeline.segments import SegmentWriter
from counterweight.workers.storage import open_store
from tests.pipeline.jobs.memory import manifest
from tests.pipeline.tiny import until
from tests.servers import S3Server, moto_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto_server() as running:
        yield running.with_bucket("jobs")


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    running: S3Server = request.getfixturevalue("server")
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://jobs/{tmp_path.name}"


def test_a_jobs_whole_life(uri: str) -> None:
    jobs = JobStore(open_store(uri))
    job, created = submit_job(jobs, manifest())
    assert (created, job.state) == (True, State.QUEUED)
    assert submit_job(jobs, manifest())[1] is False
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda name: take(JobStore(open_store(uri)), job.id, str(name)), range(8)))
    (lease,) = [one for one in got if one is not None]
    assert lease.beat() is Standing.HELD
    log = SegmentWriter(
        jobs.store, jobs.log_prefix(job.id, lease.number), "log", pytest.fail, suffix="log", seconds=0.01
    )
    log.begin()
    log.append(b"one line\n")
    log.end()
    assert [line.text for line in LogReader(jobs, job.id).lines()] == ["one line"]
    assert jobs.get(job.id).state is State.RUNNING
    cancel(jobs, job.id)
    assert lease.beat() is Standing.CANCELLED
    assert lease.end(Ended(cause=Cause.CANCELLED))
    assert [one.state for one in JobStore(open_store(uri)).all()] == [State.CANCELLED]
    assert main(["list", "--store", uri]) == 0


def test_a_lease_that_lapsed_is_taken_over(uri: str) -> None:
    """By the store's clock, which on S3 counts whole seconds."""
    jobs = JobStore(open_store(uri))
    job, _ = submit_job(jobs, manifest())
    first = take(jobs, job.id, "a", seconds=0.001)
    assert first is not None
    until(lambda: jobs.get(job.id).state is State.LAPSED)
    second = take(jobs, job.id, "b")
    assert second is not None
    assert first.beat() is Standing.LOST
    assert not first.end(Ended(cause=Cause.DONE))
    assert second.end(Ended(cause=Cause.DONE, exit_code=0, artifact="file:///x"))
    assert jobs.get(job.id).state is State.SUCCEEDED
