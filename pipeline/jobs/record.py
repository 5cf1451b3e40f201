"""What is known of a job when it is submitted; it never changes."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from pydantic import Field

from counterweight.pipeline.manifest import CompressionJob, job_id
from counterweight.pipeline.manifest.problems import Path, problem
from counterweight.pipeline.redaction import redacted
from counterweight.workers.config import Config
from counterweight.workers.errors import RequestError

HIGHEST_PRIORITY = 100

JOB_ID = r"[0-9a-f]{16}(-[1-9][0-9]{0,11})?"
"""The manifest's identity; behind a hyphen, which time it was asked for again, or by which firing of a schedule."""

TENANT = r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?"

Priority = Annotated[int, Field(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY)]
Tenant = Annotated[str, Field(pattern=f"^{TENANT}$")]


class BatchPart(Config):
    """Of which batch a job is part, and the batch's bounds. concurrency: its jobs that may run at once. max_failures: its jobs
    that may fail before the rest is cancelled. None: no bound. calibration: what the jobs of the batch have in common whose
    blocks are compressed from one calibration; None: nobody shares this job's."""

    id: str
    concurrency: int | None = None
    max_failures: int | None = None
    calibration: str | None = None


class JobRecord(Config):
    """job.json. The manifest has absolute URIs and holds no credentials: those are in the environment of whoever drives."""

    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=f"^{JOB_ID}$")]
    manifest: CompressionJob
    tenant: Tenant = "default"
    priority: Priority = 0
    batch: BatchPart | None = None

    @property
    def name(self) -> str:
        return self.manifest.metadata.name


def record_of(
    job: CompressionJob,
    *,
    tenant: str = "default",
    priority: int = 0,
    batch: BatchPart | None = None,
    again: int = 0,
) -> JobRecord:
    """The record of a manifest. again: 0, or which further time it is asked for. RequestError for no tenant's name,
    ManifestError for a manifest that holds what looks like a credential."""
    if re.fullmatch(TENANT, tenant) is None:
        raise RequestError(f"tenant {tenant[:100]!r}: expected 1 to 63 letters, digits, '-', '_' and '.'")
    document = json.loads(job.model_dump_json())
    for path, text in _texts(document, ()):
        if redacted(text) != text:
            raise problem(
                path,
                "holds what looks like a credential: expected none, because others read a job's record: credentials "
                "belong into the environment of those who drive jobs",
            )
    number = f"-{again}" if again else ""
    return JobRecord(id=f"{job_id(job)}{number}", manifest=job, tenant=tenant, priority=priority, batch=batch)


def _texts(value: object, path: Path) -> list[tuple[Path, str]]:
    """Every string of a document, with where it stands."""
    if isinstance(value, str):
        return [(path, value)]
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in _texts(part, (*path, key))]
    if isinstance(value, list):
        return [found for index, part in enumerate(value) for found in _texts(part, (*path, index))]
    return []
