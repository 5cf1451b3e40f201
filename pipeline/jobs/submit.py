"""Makes a manifest a job of a store."""

from __future__ import annotations

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.record import BatchPart, JobRecord, record_of
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import JOBS, JobStore
from counterweight.pipeline.manifest import CompressionJob
from counterweight.workers.errors import RequestError
from counterweight.workers.storage import probe

MAX_AGAIN = 100_000


def submit_job(
    jobs: JobStore,
    manifest: CompressionJob,
    *,
    tenant: str = "default",
    priority: int = 0,
    batch: BatchPart | None = None,
    again: bool = False,
) -> tuple[Job, bool]:
    """The job of a manifest, and whether this call made it: submitted twice, it is one job, unless `again`, or it was deleted.

    RequestError for a manifest with a credential in it, for a wrong tenant, and for a store without an atomic create;
    StorageError.
    """

    def made(number: int) -> JobRecord:
        return record_of(manifest, tenant=tenant, priority=priority, batch=batch, again=number)

    for number in range(MAX_AGAIN):
        job, created = put_job(jobs, made(number))
        if created or not (again or job.state is State.DELETED):
            return job, created
    raise RequestError(f"job {made(0).id}: submitted {MAX_AGAIN} times: expected fewer")


def put_job(jobs: JobStore, record: JobRecord) -> tuple[Job, bool]:
    """The job of a record, and whether this call made it. RequestError for a store without an atomic create; StorageError."""
    check_store(jobs)
    created = jobs.submit(record)
    return jobs.get(record.id), created


def check_store(jobs: JobStore) -> None:
    """Probes a store before its first job: everything rests on its atomic create. RequestError, StorageError."""
    if not jobs.checked and next(iter(jobs.store.list(f"{JOBS}/")), None) is None:
        probe(jobs.store)
    jobs.checked = True
