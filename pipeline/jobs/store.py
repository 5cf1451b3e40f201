"""Jobs in an object store: read, submitted, and the one way in which anything about them changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from counterweight.pipeline.jobs.job import Dated, Job, fold
from counterweight.pipeline.jobs.journal import ENTRY, Deleted, Entry
from counterweight.pipeline.jobs.queue import Entrant, Limits, in_order, startable
from counterweight.pipeline.jobs.record import JOB_ID, JobRecord
from counterweight.workers.config import first_problem
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError, UnknownIdError
from counterweight.workers.storage import ObjectInfo, ObjectStore, open_store

JOBS = "_jobs"
LOGS = "_logs"
LIMITS = f"{JOBS}/limits.json"

REQUESTS = 16
"""Requests under way at once."""

_KEY = re.compile(rf"{JOBS}/(?P<id>{JOB_ID})/(?P<what>job|journal|beats)(/(?P<number>[0-9]{{4}}))?\.json")
_ID = re.compile(JOB_ID)

Parsed = TypeVar("Parsed")

_RECORD = TypeAdapter(JobRecord)
_LIMITS = TypeAdapter(Limits)


@dataclass
class _Listed:
    """What a listing says of one job."""

    record: ObjectInfo | None = None
    journal: list[ObjectInfo] = field(default_factory=list)
    beats: dict[int, datetime] = field(default_factory=dict)


class JobStore:
    """The jobs below one store. Every method raises StorageError when the store fails, IntegrityError for a damaged object.

    Records and journal entries are created once, so each is read once and remembered.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.checked = False
        """Whether the store is known to create objects atomically (`submit.check_store`)."""
        self._records: dict[str, JobRecord] = {}
        self._entries: dict[str, Entry] = {}

    @classmethod
    def at(cls, uri: str) -> JobStore:
        """Those of the store at a URI, which is not waited for where it is away: whoever drives has a patience of its own, and
        whoever asks wants to know. RequestError for a URI that names no store."""
        return cls(open_store(uri, waits=False))

    def submit(self, record: JobRecord) -> bool:
        """Makes the job known. False when it is known already: then the earlier record stays."""
        key = f"{JOBS}/{record.id}/job.json"
        created = self.store.create(key, record.model_dump_json(indent=1).encode())
        if created:
            self._records[key] = record
        return created

    def get(self, id: str) -> Job:
        """UnknownIdError when there is no such job."""
        if _ID.fullmatch(id) is None:
            raise UnknownIdError(f"job {id[:100]!r}: expected 16 hex digits, as `submit` and `list` print them")
        found = self._read(self.store.list(f"{JOBS}/{id}/"))
        if not found:
            raise UnknownIdError(f"job {id}: no such job in {self.store.uri}")
        return found[0]

    def all(self) -> list[Job]:
        """Every job, first submitted first."""
        return sorted(self._read(self.store.list(f"{JOBS}/")), key=lambda job: (job.submitted, job.id))

    def append(self, id: str, entry: Entry, allowed: Callable[[Job], bool]) -> int | None:
        """Appends an entry to a job's journal: the only writer of what changes. Its number, or None where it is not allowed.

        allowed: whether the entry makes sense for the job as it is; asked again whenever somebody else was faster. A job at its
        end takes none but that it is deleted. UnknownIdError when there is no such job.
        """
        while True:
            job = self.get(id)
            mine = [number for number, dated in enumerate(job.journal, 1) if dated.entry.nonce == entry.nonce]
            if mine:  # created before, and the answer was lost
                return mine[0]
            if (job.state.terminal and not isinstance(entry, Deleted)) or not allowed(job):
                return None
            number = len(job.journal) + 1
            if self.store.create(f"{JOBS}/{id}/journal/{number:04}.json", ENTRY.dump_json(entry)):
                return number

    def beat(self, id: str, lease: int) -> None:
        """Shows that the holder of a lease lives: the object's date is what counts."""
        self.store.write(f"{JOBS}/{id}/beats/{lease:04}.json", b"{}")

    def limits(self) -> Limits:
        """None of them where nobody has set any."""
        try:
            return parsed(_LIMITS, self.store.read(LIMITS), self.store.uri_of(LIMITS))
        except ObjectNotFoundError:
            return Limits()

    def set_limits(self, limits: Limits) -> None:
        """For all who drive jobs of this store, from their next look on."""
        self.store.write(LIMITS, limits.model_dump_json(indent=1).encode())

    def logs_of(self, id: str) -> str:
        """Where the words of all its runs lie."""
        return f"{LOGS}/{id}/"

    def log_prefix(self, id: str, lease: int) -> str:
        """Where the words of the run under a lease lie."""
        return f"{LOGS}/{id}/{lease:04}"

    def _read(self, infos: Iterable[ObjectInfo]) -> list[Job]:
        listed: dict[str, _Listed] = {}
        for info in infos:
            match = _KEY.fullmatch(info.key)
            if match is None:
                continue
            one = listed.setdefault(match["id"], _Listed())
            if match["what"] == "job":
                one.record = info
            elif match["what"] == "journal":
                one.journal.append(info)
            else:
                one.beats[int(match["number"])] = info.modified
        known = [one for one in listed.values() if one.record is not None]
        if not known:
            return []
        now = self.store.now()  # before anything is read, which may take long: dates of beats are as old as the listing
        self._fetch(known)
        return [self._job(one, now) for one in known]

    def _fetch(self, listed: Sequence[_Listed]) -> None:
        """Reads what is not remembered yet, several objects at once."""
        records = [one.record.key for one in listed if one.record is not None and one.record.key not in self._records]
        entries = [info.key for one in listed for info in one.journal if info.key not in self._entries]
        if len(records) + len(entries) > 1:
            with ThreadPoolExecutor(REQUESTS, "jobs") as threads:
                list(threads.map(self._record, records))
                list(threads.map(self._entry, entries))

    def _job(self, listed: _Listed, now: datetime) -> Job:
        assert listed.record is not None
        journal = [Dated(self._entry(info.key), info.modified) for info in listed.journal]
        return fold(self._record(listed.record.key), listed.record.modified, journal, listed.beats, now)

    def _record(self, key: str) -> JobRecord:
        return self._remembered(key, self._records, _RECORD)

    def _entry(self, key: str) -> Entry:
        return self._remembered(key, self._entries, ENTRY)

    def _remembered(self, key: str, known: dict[str, Parsed], kind: TypeAdapter[Parsed]) -> Parsed:
        if key not in known:
            known[key] = parsed(kind, self.store.read(key), self.store.uri_of(key))
        return known[key]


def parsed(kind: TypeAdapter[Parsed], data: bytes, uri: str) -> Parsed:
    """What an object holds; IntegrityError, naming it, where it is something else."""
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"{uri}: damaged, or of a later version: {first_problem(error)}") from error


def entrant_of(job: Job) -> Entrant:
    """What the queue knows of a job."""
    record = job.record
    return Entrant(
        id=job.id,
        state=job.state,
        submitted=job.submitted,
        priority=record.priority,
        tenant=record.tenant,
        batch=record.batch,
    )


def queue_of(jobs: Sequence[Job], limits: Limits) -> dict[str, list[str]]:
    """Ids of the jobs that wait, in order, and of those that may start now."""
    entrants = [entrant_of(job) for job in jobs]
    return {"queue": [entrant.id for entrant in in_order(entrants)], "startable": startable(entrants, limits)}
