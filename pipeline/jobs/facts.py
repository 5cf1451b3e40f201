"""What is said of a job, to programs and to people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import ENTRY, Leased
from counterweight.pipeline.jobs.states import State

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
    told = [(name, str(value)) for name, value in facts(job).items() if value not in (None, {}) and name not in _HIDDEN]
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
