"""What people name, a job or a batch of jobs, as jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from counterweight.pipeline.jobs.batch import Batch, get_batch, is_batch, submit_batch
from counterweight.pipeline.jobs.facts import batch_facts, facts, schedule_facts
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.schedule import Schedules
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.jobs.submit import submit_job
from counterweight.pipeline.manifest import Submission
from counterweight.workers.errors import RequestError


@dataclass(frozen=True, slots=True)
class Submitted:
    """What was submitted. created: now, rather than before. drivers: how many more of them it could use."""

    id: str
    created: bool
    drivers: int
    facts: dict[str, object]


def submitted(
    jobs: JobStore, asked: Submission, *, tenant: str = "default", priority: int = 0, again: bool = False
) -> Submitted:
    """Submits a job, or a batch and all of its jobs. Raises as `submit_job`."""
    if asked.batch is None:
        (only,) = asked.jobs
        job, created = submit_job(jobs, only.job, tenant=tenant, priority=priority, again=again)
        return Submitted(job.id, created, _undriven([job]), facts(job))
    if asked.batch.spec.schedule is not None:
        if again:
            raise RequestError("--again: a schedule submits its jobs again and again by itself: expected no --again")
        schedule, created = Schedules(jobs).submit(asked.batch, asked.jobs, tenant=tenant, priority=priority)
        return Submitted(schedule.record.id, created, 0, schedule_facts(schedule, jobs.store.now()))
    batch, created = submit_batch(jobs, asked.batch, asked.jobs, tenant=tenant, priority=priority, again=again)
    running = sum(job.live for job in batch.jobs)
    drivers = min(_undriven(batch.jobs), batch.record.concurrency - running)
    return Submitted(batch.id, created, max(drivers, 0), batch_facts(batch))


def batch_or_job(jobs: JobStore, id: str) -> tuple[Batch | None, Job | None]:
    """What an id names, one of the two. RequestError when it names neither."""
    return (get_batch(jobs, id), None) if is_batch(id) else (None, jobs.get(id))


def members(jobs: JobStore, id: str) -> list[str]:
    """Ids of the jobs of a batch, or of the job itself. RequestError when there is no such thing."""
    batch, job = batch_or_job(jobs, id)
    return [one.id for one in (batch.jobs if batch is not None else [job] if job is not None else [])]


def _undriven(jobs: Sequence[Job]) -> int:
    """How many are not at their end and have no living driver."""
    return sum(not job.state.terminal and not job.live for job in jobs)
