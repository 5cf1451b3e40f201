"""Batches: which jobs were asked for together. A record that never changes; how a batch stands is how its jobs stand.

_batches/<id>/batch.json    created once, when all of its jobs are known
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.record import BatchPart, record_of
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import JobStore, parsed
from counterweight.pipeline.jobs.submit import MAX_AGAIN, check_store
from counterweight.pipeline.manifest import CompressionBatch, CompressionJob, SubmittedJob, calibration_id, job_id
from counterweight.workers.config import Config
from counterweight.workers.errors import ObjectNotFoundError, UnknownIdError
from counterweight.workers.keys import digest

BATCHES = "_batches"
BATCH_ID = r"batch-[0-9a-f]{16}(-[1-9][0-9]{0,11})?"

_ID = re.compile(BATCH_ID)
_KEY = re.compile(rf"{BATCHES}/({BATCH_ID})/batch\.json")


class Member(Config):
    """A job of a batch, and the settings under which it was made."""

    id: str
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)


class BatchRecord(Config):
    """batch.json."""

    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=f"^{BATCH_ID}$")]
    name: str
    members: tuple[Member, ...]
    concurrency: int
    max_failures: int | None


_RECORD = TypeAdapter(BatchRecord)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it stands: its record and its jobs, in the order of the record."""

    record: BatchRecord
    jobs: tuple[Job, ...]

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> State:
        """That of a job which does all of its work: at its end when every job is, and failed when one of them is."""
        states = [job.state for job in self.jobs]
        if all(state.terminal for state in states):
            bad = (State.FAILED, State.CANCELLED)
            return next((state for state in bad if state in states), State.SUCCEEDED)
        return State.RUNNING if any(state.active or state.terminal for state in states) else State.QUEUED


def submit_batch(
    jobs: JobStore,
    batch: CompressionBatch,
    members: Sequence[SubmittedJob],
    *,
    tenant: str = "default",
    priority: int = 0,
    again: bool = False,
) -> tuple[Batch, bool]:
    """Submits every job of a batch, then the batch. Whether this call made it: the same batch submitted twice is one, and a job
    that was submitted before, alone or in another batch, is that job. Raises as `submit_job`."""
    free = (n for n in range(1, MAX_AGAIN) if not jobs.store.exists(_key(batch_id(batch, members, n))))
    return put_batch(jobs, batch, members, next(free) if again else 0, tenant=tenant, priority=priority)


def batch_id(batch: CompressionBatch, members: Sequence[SubmittedJob], number: int) -> str:
    """Of its name, bounds and jobs. number: 0, or which further time it is asked for."""
    bounds = [batch.spec.concurrency, batch.spec.max_failures]
    identity = digest([batch.metadata.name, [job_id(member.job) for member in members], *bounds])[:16]
    return f"batch-{identity}" + (f"-{number}" if number else "")


def put_batch(
    jobs: JobStore,
    batch: CompressionBatch,
    members: Sequence[SubmittedJob],
    number: int,
    *,
    tenant: str = "default",
    priority: int = 0,
) -> tuple[Batch, bool]:
    """`submit_batch` for the time of this number; done again, it adds what is missing and changes nothing."""
    id = batch_id(batch, members, number)
    known = {member.job.metadata.name: calibration_id(member.job) for member in members}
    shared = Counter(known.values())

    def part_of(job: CompressionJob) -> BatchPart:
        calibration = known[job.metadata.name]
        return BatchPart(
            id=id,
            concurrency=batch.spec.concurrency,
            max_failures=batch.spec.max_failures,
            calibration=calibration if shared[calibration] > 1 else None,
        )

    check_store(jobs)
    records = [
        record_of(member.job, tenant=tenant, priority=priority, batch=part_of(member.job), again=number)
        for member in members
    ]
    for made in records:
        jobs.submit(made)
    record = BatchRecord(
        id=id,
        name=batch.metadata.name,
        members=tuple(
            Member(id=made.id, settings=member.settings) for made, member in zip(records, members, strict=True)
        ),
        concurrency=batch.spec.concurrency,
        max_failures=batch.spec.max_failures,
    )
    created = jobs.store.create(_key(id), record.model_dump_json(indent=1).encode())
    return get_batch(jobs, id), created


def is_batch(id: str) -> bool:
    """Whether an id is that of a batch, rather than of a job."""
    return id.startswith("batch-")


def get_batch(jobs: JobStore, id: str) -> Batch:
    """UnknownIdError when there is no such batch; StorageError."""
    if _ID.fullmatch(id) is None:
        raise UnknownIdError(
            f"batch {id[:100]!r}: expected batch- and 16 hex digits, as `submit` and `list` print them"
        )
    try:
        record = parsed(_RECORD, jobs.store.read(_key(id)), jobs.store.uri_of(_key(id)))
    except ObjectNotFoundError as error:
        raise UnknownIdError(f"batch {id}: no such batch in {jobs.store.uri}") from error
    return Batch(record, tuple(jobs.get(member.id) for member in record.members))


def all_batches(jobs: JobStore) -> list[Batch]:
    """First submitted first; StorageError."""
    listed = sorted(jobs.store.list(f"{BATCHES}/"), key=lambda info: (info.modified, info.key))
    found = (_KEY.fullmatch(info.key) for info in listed)
    return [get_batch(jobs, match[1]) for match in found if match is not None]


def _key(id: str) -> str:
    return f"{BATCHES}/{id}/batch.json"
