"""What is said of a job, to programs and to people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from counterweight.pipeline.jobs.batch import Batch
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import ENTRY, Leased
from counterweight.pipeline.jobs.pareto import Summary
from counterweight.pipeline.jobs.schedule import Schedule
from counterweight.pipeline.jobs.states import State

BATCH_HEADINGS = ("BATCH", "NAME", "STATE", "JOBS")
SCHEDULE_HEADINGS = ("SCHEDULE", "NAME", "STATE", "WHEN", "TIME ZONE")
PARETO_HEADINGS = ("JOB", "NAME", "STATE", "BITS", "PERPLEXITY", "KL", "FRONT")

HEADINGS = ("JOB", "NAME", "STATE", "TENANT", "PRIORITY", "SUBMITTED", "LAST")


def facts(job: Job) -> dict[str, object]:
    """As JSON."""
    ended, record = job.ended, job.record
    return {
        "id": job.id,
        "name": record.name,
        "state": job.state.value,
        "tenant": record.tenant,
        "priority": record.priority,
        "batch": None if record.batch is None else record.batch.id,
        "submitted": job.submitted.isoformat(timespec="seconds"),
        "attempts": sum(isinstance(dated.entry, Leased) for dated in job.journal),
        "failures": {cause.value: count for cause, count in job.failures.items()},
        "driver": job.holder,
        "driver_lives": job.live,
        "due": job.due.isoformat(timespec="seconds") if job.due is not None and job.state is State.WAITING else None,
        "cause": None if ended is None else ended.cause.value,
        "exit_code": None if ended is None else ended.exit_code,
        "line": None if ended is None else ended.line,
        "artifact": None if ended is None else ended.artifact,
    }


def history(job: Job) -> list[dict[str, object]]:
    """The journal as JSON."""
    return [
        {"at": dated.at.isoformat(timespec="seconds"), **ENTRY.dump_python(dated.entry, mode="json", exclude={"nonce"})}
        for dated in job.journal
    ]


def rows(job: Job) -> list[tuple[str, str]]:
    """Label and value of each line, for people."""
    told = [
        (name, str(value)) for name, value in facts(job).items() if value not in (None, {}, "") and name not in _HIDDEN
    ]
    return [(name.replace("_", " "), value) for name, value in told]


_HIDDEN = ("id", "failures", "driver_lives")


def table(jobs: Sequence[Job]) -> list[Sequence[str]]:
    """Headings and a row for each job."""
    return [HEADINGS, *(_row(job) for job in jobs)]


def _row(job: Job) -> Sequence[str]:
    ended, record = job.ended, job.record
    last = "" if ended is None else ended.artifact or ended.line or ended.cause.value
    submitted = job.submitted.isoformat(timespec="seconds")
    return (job.id, record.name, job.state.value, record.tenant, str(record.priority), submitted, last[:80])


def counts(jobs: Sequence[Job]) -> dict[str, int]:
    """How many jobs are in each state that any is in."""
    found = Counter(job.state for job in jobs)
    return {state.value: found[state] for state in State if found[state]}


def batch_facts(batch: Batch) -> dict[str, object]:
    """As JSON."""
    record = batch.record
    return {
        "id": batch.id,
        "name": record.name,
        "state": batch.state.value,
        "concurrency": record.concurrency,
        "max_failures": record.max_failures,
        "counts": counts(batch.jobs),
    }


def batch_table(batches: Sequence[Batch]) -> list[Sequence[str]]:
    """Headings and a row for each batch."""
    return [BATCH_HEADINGS, *(_batch_row(batch) for batch in batches)]


def _batch_row(batch: Batch) -> Sequence[str]:
    told = ", ".join(f"{count} {state}" for state, count in counts(batch.jobs).items())
    return (batch.id, batch.record.name, batch.state.value, told)


def schedule_facts(schedule: Schedule, now: datetime) -> dict[str, object]:
    """As JSON."""
    record = schedule.record
    return {
        "id": record.id,
        "name": record.batch.metadata.name,
        "state": "stopped" if schedule.stopped else "scheduled",
        "schedule": record.cron,
        "timeZone": record.zone,
        "next": [moment.isoformat() for moment in schedule.next(now)],
        "fired": {moment.isoformat(): verdict.value for moment, verdict in schedule.fired.items()},
    }


def schedule_table(schedules: Sequence[Mapping[str, object]]) -> list[Sequence[str]]:
    """Headings and a row for each schedule's facts."""
    told = ("id", "name", "state", "schedule", "timeZone")
    return [SCHEDULE_HEADINGS, *(tuple(str(one[name]) for name in told) for one in schedules)]


def pareto_table(summary: Summary) -> list[Sequence[str]]:
    """Headings and a row for each job of a batch."""
    fronts = {"perplexity": summary.perplexity_front, "KL": summary.kl_front}
    return [
        PARETO_HEADINGS,
        *(
            (
                point.job,
                point.name,
                point.state,
                _figure(point.bits, ".3f"),
                _figure(point.perplexity, ".3f"),
                _figure(point.kl, ".4f"),
                ", ".join(name for name, jobs in fronts.items() if point.job in jobs),
            )
            for point in summary.points
        ),
    ]


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
