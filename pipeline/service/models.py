"""What the API answers with, as it stands in its OpenAPI document. Moments are ISO 8601, by the store's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, JsonValue

from counterweight.workers.config import Config


class JobFacts(Config):
    """How a job stands (`jobs.facts.facts`)."""

    id: str
    name: str
    state: str
    tenant: str
    priority: int
    batch: str | None
    submitted: str
    attempts: int
    """Leases that were taken on it."""
    failures: Mapping[str, int]
    """Cause -> attempts that were repeated for it."""
    driver: str | None
    driver_lives: bool
    due: str | None
    """When a job that waits is tried again."""
    cause: str | None
    """Why the last attempt ended, where none runs."""
    exit_code: int | None
    line: str | None
    artifact: str | None
    """URI of what it published."""


class JobDetail(JobFacts):
    """A job, its history and what was asked."""

    obstacle: str | None
    """Why no driver that stands by can run it, where it waits for one."""
    journal: Sequence[Mapping[str, JsonValue]]
    manifest: Mapping[str, JsonValue]


class JobPage(Config):
    """Some of the jobs, last submitted first. next: the cursor of those that follow; null: none do."""

    jobs: Sequence[JobFacts]
    next: str | None


class QueueFacts(Config):
    """How many jobs are in each state; those that wait, in order; those that may start now."""

    jobs: Mapping[str, int]
    queue: Sequence[str]
    startable: Sequence[str]


class DriverFacts(Config):
    """A driver that was heard of lately. gpus: that its workers can have; null: whatever its cluster has. said: its last line,
    for an admin."""

    holder: str
    gpus: int | None
    heard: str
    said: str | None


class DriverList(Config):
    """By their names."""

    drivers: Sequence[DriverFacts]


class BatchFacts(Config):
    """How a batch stands (`jobs.facts.batch_facts`)."""

    id: str
    name: str
    state: str
    concurrency: int
    max_failures: int | None
    counts: Mapping[str, int]


class BatchDetail(BatchFacts):
    """A batch and its jobs."""

    jobs: Sequence[JobFacts]


class BatchList(Config):
    """First submitted first."""

    batches: Sequence[BatchFacts]


class PointFacts(Config):
    """What a job of a batch cost and is worth (`jobs.pareto.Point`)."""

    job: str
    name: str
    state: str
    settings: Mapping[str, JsonValue]
    artifact: str | None
    bits: float | None
    perplexity: float | None
    kl: float | None


class BatchReport(Config):
    """A batch in figures (`jobs.pareto.Summary`). *_front: jobs that no other one dominates."""

    id: str
    name: str
    state: str
    points: Sequence[PointFacts]
    original: float | None
    perplexity_front: Sequence[str]
    kl_front: Sequence[str]


class ScheduleFacts(Config):
    """How a schedule stands (`jobs.facts.schedule_facts`). next: firings to come; fired: firing -> what became of it."""

    id: str
    name: str
    state: str
    schedule: str
    timeZone: str
    next: Sequence[str]
    fired: Mapping[str, str]


class ScheduleList(Config):
    """By id."""

    schedules: Sequence[ScheduleFacts]


class FileUrl(Config):
    """A file of an artifact. url: presigned, for anybody; or, where `token` is true, a path of this service."""

    url: str
    token: bool
    size: int
    sha256: str | None = Field(
        description="of every byte, in hex; null for artifact.json, which holds those of the others"
    )


class FileUrls(Config):
    """expires_in: seconds that presigned URLs hold."""

    name: str
    id: str
    expires_in: int
    files: Mapping[str, FileUrl]


class TagList(Config):
    """Tag -> id of the artifact that it is on."""

    name: str
    tags: Mapping[str, str]


class Health(Config):
    """The service answers."""

    status: Literal["ok"] = "ok"
