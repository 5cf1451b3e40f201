"""Schedules in a store: batches that are submitted again and again, by whichever instance is there, each time once.

    _schedules/<id>/schedule.json                      created once: the batch, its jobs, when
    _schedules/<id>/firings/20260329T0030Z.json        created once each: what became of a firing
    _schedules/<id>/stopped.json                       created once: it fires no more

Whoever creates a firing's record has decided it; the others find the key taken. What a started firing submits is named after
the firing, so that it may be submitted twice and is there once: whoever finds a decided firing without its batch submits it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from counterweight.pipeline.jobs.batch import Batch, batch_id, get_batch, put_batch
from counterweight.pipeline.jobs.firing import NUMBER, STAMP, Verdict, due, following, verdicts
from counterweight.pipeline.jobs.lease import cancel
from counterweight.pipeline.jobs.record import Priority, Tenant, record_of
from counterweight.pipeline.jobs.store import JobStore, parsed
from counterweight.pipeline.jobs.submit import check_store
from counterweight.pipeline.manifest import CompressionBatch, SubmittedJob
from counterweight.pipeline.manifest.batch import Overlap
from counterweight.workers.config import Config
from counterweight.workers.errors import RequestError
from counterweight.workers.keys import digest
from counterweight.workers.storage import ObjectInfo

SCHEDULES = "_schedules"
SCHEDULE_ID = r"schedule-[0-9a-f]{16}"

_ID = re.compile(SCHEDULE_ID)
_FIRING = re.compile(r"[0-9]{8}T[0-9]{4}Z")


class ScheduleRecord(Config):
    """schedule.json. members: the batch's jobs, as its manifest had them when it was submitted."""

    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=f"^{SCHEDULE_ID}$")]
    batch: CompressionBatch
    members: tuple[SubmittedJob, ...]
    tenant: Tenant = "default"
    priority: Priority = 0

    @property
    def cron(self) -> str:
        """RequestError for a batch without a schedule."""
        if self.batch.spec.schedule is None:
            raise RequestError(f"{self.id}: spec.schedule: null: expected a cron expression")
        return self.batch.spec.schedule

    @property
    def zone(self) -> str:
        return self.batch.spec.timeZone

    @property
    def deadline(self) -> timedelta:
        return timedelta(seconds=self.batch.spec.missed_after_seconds)


class Firing(Config):
    """What became of one."""

    version: Literal[1] = 1
    verdict: Verdict


_RECORD, _DECIDED = TypeAdapter(ScheduleRecord), TypeAdapter(Firing)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as it stands. fired: firing -> what became of it, in order."""

    record: ScheduleRecord
    submitted: datetime
    fired: dict[datetime, Verdict]
    stopped: bool

    @property
    def last_started(self) -> datetime | None:
        return next((at for at, verdict in reversed(self.fired.items()) if verdict is Verdict.STARTED), None)

    def next(self, now: datetime, count: int = 3) -> list[datetime]:
        """Its next firings; none when it is stopped."""
        return [] if self.stopped else following(self.record.cron, self.record.zone, now, count)


@dataclass
class Schedules:
    """Those of a store. Every method raises StorageError when the store fails."""

    jobs: JobStore
    _records: dict[str, ScheduleRecord] = field(default_factory=dict)
    _fired: dict[str, Verdict] = field(default_factory=dict)
    _whole: set[str] = field(default_factory=set)
    """Batches that are known to be submitted."""

    def submit(
        self, batch: CompressionBatch, members: tuple[SubmittedJob, ...], *, tenant: str = "default", priority: int = 0
    ) -> tuple[Schedule, bool]:
        """Makes a schedule known; whether this call did. RequestError as of `submit_job`."""
        for member in members:
            record_of(member.job, tenant=tenant)  # refuses now what it would refuse at night
        check_store(self.jobs)
        identity = digest([batch.model_dump(mode="json"), [member.model_dump(mode="json") for member in members]])
        record = ScheduleRecord(
            id=f"schedule-{identity[:16]}", batch=batch, members=members, tenant=tenant, priority=priority
        )
        created = self.jobs.store.create(
            f"{SCHEDULES}/{record.id}/schedule.json", record.model_dump_json(indent=1).encode()
        )
        return self.get(record.id), created

    def get(self, id: str) -> Schedule:
        """RequestError when there is no such schedule."""
        if _ID.fullmatch(id) is None:
            raise RequestError(f"schedule {id[:100]!r}: expected schedule- and 16 hex digits")
        found = self._read(self.jobs.store.list(f"{SCHEDULES}/{id}/"))
        if not found:
            raise RequestError(f"schedule {id}: no such schedule in {self.jobs.store.uri}")
        return found[0]

    def all(self) -> list[Schedule]:
        """By id."""
        return self._read(self.jobs.store.list(f"{SCHEDULES}/"))

    def _read(self, infos: Iterable[ObjectInfo]) -> list[Schedule]:
        listed: dict[str, dict[str, ObjectInfo]] = {}
        for info in infos:
            _, id, *name = info.key.split("/")
            if _ID.fullmatch(id) is not None:
                listed.setdefault(id, {})["/".join(name)] = info
        return [self._schedule(id, names) for id, names in listed.items() if "schedule.json" in names]

    def _schedule(self, id: str, listed: Mapping[str, ObjectInfo]) -> Schedule:
        prefix = f"{SCHEDULES}/{id}"
        if id not in self._records:
            key = f"{prefix}/schedule.json"
            self._records[id] = parsed(_RECORD, self.jobs.store.read(key), self.jobs.store.uri_of(key))
        stamps = sorted(name[8:-5] for name in listed if name.startswith("firings/") and _FIRING.fullmatch(name[8:-5]))
        fired = {_moment(stamp): self._verdict(f"{prefix}/firings/{stamp}.json") for stamp in stamps}
        return Schedule(self._records[id], listed["schedule.json"].modified, fired, "stopped.json" in listed)

    def stop(self, id: str) -> Schedule:
        """It fires no more; what it has started goes on."""
        self.get(id)
        self.jobs.store.create(f"{SCHEDULES}/{id}/stopped.json", b"{}")
        return self.get(id)

    def tick(self) -> None:
        """Decides and starts what is due of every schedule, and finishes what another instance began."""
        for schedule in self.all():
            if not schedule.stopped:
                self._fire(schedule, self.jobs.store.now())

    def _fire(self, schedule: Schedule, now: datetime) -> None:
        record, last = schedule.record, schedule.last_started
        after = max(schedule.fired, default=schedule.submitted)
        moments = due(record.cron, record.zone, after, now, record.deadline)
        if last is not None and batch_id(record.batch, record.members, _number(last)) not in self._whole:
            self._batch(record, last)  # whoever decided it may have died behind that
        if not moments:
            return
        before = None if last is None else self._batch(record, last)
        busy = before is not None and not before.state.terminal
        for moment, verdict in verdicts(moments, record.batch.spec.overlap, busy):
            key = f"{SCHEDULES}/{record.id}/firings/{moment.strftime(STAMP)}.json"
            created = self.jobs.store.create(key, Firing(verdict=verdict).model_dump_json().encode())
            if created and verdict is Verdict.STARTED:
                if before is not None and record.batch.spec.overlap is Overlap.REPLACE:
                    for job in before.jobs:
                        cancel(self.jobs, job.id, "its schedule fired again")
                self._batch(record, moment)

    def _batch(self, record: ScheduleRecord, moment: datetime) -> Batch:
        """What a started firing submitted; submitted now where that is not done."""
        number = _number(moment)
        id = batch_id(record.batch, record.members, number)
        if id not in self._whole:
            put_batch(self.jobs, record.batch, record.members, number, tenant=record.tenant, priority=record.priority)
            self._whole.add(id)
        return get_batch(self.jobs, id)

    def _verdict(self, key: str) -> Verdict:
        if key not in self._fired:
            self._fired[key] = parsed(_DECIDED, self.jobs.store.read(key), self.jobs.store.uri_of(key)).verdict
        return self._fired[key]


def is_schedule(id: str) -> bool:
    """Whether an id is that of a schedule."""
    return id.startswith("schedule-")


def _number(moment: datetime) -> int:
    """Behind the ids of what a firing submits."""
    return int(moment.strftime(NUMBER))


@lru_cache(1 << 16)  # each look asks for all that have fired
def _moment(stamp: str) -> datetime:
    return datetime.strptime(stamp, STAMP).replace(tzinfo=UTC)
