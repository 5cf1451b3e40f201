"""Removes from an output what nothing refers to and nobody used for a while. Published artifacts are never touched.

What is older than the age goes, by the store's clock:

- unfinished writes: temporary files and multipart uploads of processes that were killed; probes of a store and of who sees it
  likewise
- records of tasks (`_work/commits`), finished or not: a job that uses one makes it young (`Workspace.lookup`), so what is
  old no run of the last days has used. A later job does such a task again, to the same bytes
- blobs that no remaining record names, hidden states among them; whatever a young record names stays, old or not
- artifacts without artifact.json, when their newest file is old
- events of a run and reports of a failed gate, when the newest of them is old

A name of 64 hex digits anywhere in a record counts as a reference to that blob. A record that cannot be read could name
any, so it stops everything before the first delete. What has no place in this list is left alone, and told.

Records go before blobs, and a blob goes only when no record that is there names it; so a prune may be killed anywhere, or
run twice at once. How it stays out of the way of jobs is told in `workers.workspace`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta

from counterweight.pipeline.artifact import DOCUMENT, LATEST
from counterweight.pipeline.artifact.tags import TAG, TAGS
from counterweight.pipeline.event_store import EVENTS
from counterweight.pipeline.jobs.batch import BATCHES
from counterweight.pipeline.jobs.drivers import NAME as DRIVER
from counterweight.pipeline.jobs.schedule import SCHEDULES
from counterweight.pipeline.jobs.store import JOBS, LOGS
from counterweight.workers.checkpoint.strict_json import parse_object
from counterweight.workers.errors import (
    CheckpointError,
    IntegrityError,
    ObjectNotFoundError,
    RequestError,
    StorageError,
)
from counterweight.workers.ledger import LEDGER
from counterweight.workers.storage import ObjectInfo, ObjectStore, open_store
from counterweight.workers.storage.names import file_root
from counterweight.workers.storage.probe import PROBES
from counterweight.workers.workspace import BLOBS, COMMITS, LAPSE, PRUNES, WORK, Blob, Workspace

REQUESTS = 16
"""Requests under way at once."""

MAX_VALUES = 10_000_000
"""JSON values of a record: the ledger of a block of a thousand experts has some ten thousand."""

UNFINISHED = "unfinished writes"
RECORDS = "records"
_BLOBS = "blobs"
_ARTIFACTS = "unpublished artifacts"
_PRUNES = "killed prunes"
KINDS = (UNFINISHED, RECORDS, _BLOBS, _ARTIFACTS, "events", "failed reports", "probes", "drivers", _PRUNES)

_KEPT = "kept"
_PLACES = [
    (kind, re.compile(pattern))
    for kind, pattern in (
        # The group is what is judged and removed as one; without one, the object itself is.
        (RECORDS, rf"{COMMITS}/[^/]+/[^/]+\.json"),
        (_BLOBS, rf"{BLOBS}/[0-9a-f]{{64}}"),
        (_PRUNES, rf"{PRUNES}/[0-9a-f]{{32}}"),
        ("events", rf"({EVENTS}/[^/]+/[^/]+/)[0-9]+\.jsonl"),
        ("failed reports", rf"({WORK}/failed/[^/]+/)report\.(?:json|html)"),
        ("probes", rf"({re.escape(PROBES)}/[0-9a-f]{{32}}/)(?:once|plain|race-[0-9]+|seen)"),
        ("drivers", DRIVER),
        (_KEPT, rf"[a-z0-9-]{{1,63}}/(?:{re.escape(LATEST)}|{TAGS}/{TAG}/[0-9]{{4}}\.json)"),
        (
            _KEPT,
            rf"(?:{JOBS}|{LOGS}|{BATCHES}|{SCHEDULES})/.+",
        ),  # jobs are few and small, and who asks for an old one wants to know
        (_ARTIFACTS, r"([a-z0-9-]{1,63}/[0-9a-f]{16}/).+"),
    )
]
_MARK = re.compile(rf"{re.escape(LEDGER)}|model-[0-9]{{5}}-of-[0-9]{{5}}\.safetensors")
"""Files by which a folder is known as an artifact of ours. They are removed last, so that the rest is still known then."""

_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Tally:
    """How many objects, and their bytes in sum."""

    objects: int = 0
    bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.objects + other.objects, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be, by kind; and the keys that were left alone because their place is not known."""

    uri: str
    older_than: timedelta
    dry_run: bool
    removed: dict[str, Tally]
    total: Tally
    left: tuple[str, ...]

    def facts(self) -> dict[str, object]:
        """As JSON."""
        return {
            "uri": self.uri,
            "older_than_seconds": self.older_than.total_seconds(),
            "dry_run": self.dry_run,
            "removed": {kind: asdict(tally) for kind, tally in self.removed.items()},
            "total": asdict(self.total),
            "left_alone": list(self.left),
        }


@dataclass(frozen=True, slots=True)
class Target:
    """What is removed as one. name: its key; that of a folder ends with a slash. objects: in the order of removal."""

    kind: str
    name: str
    objects: tuple[ObjectInfo, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What an output holds that may go, and the keys whose place is not known."""

    targets: tuple[Target, ...]
    left: tuple[str, ...]


def prune(uri: str, older_than: timedelta, *, dry_run: bool = False) -> Pruned:
    """Removes what nothing refers to from the output at `uri`.

    older_than: what was written or used within this time stays. Beside running jobs it has to be longer than any run of
    one (`workers.workspace`). RequestError when there is no such place, IntegrityError when a record cannot be read (then
    nothing is removed), StorageError when the store fails: what is removed by then is removed, the rest is for the next.
    """
    if older_than < timedelta(0):
        raise RequestError(f"older_than: {older_than}: expected at least 0")
    store = open_store(uri)
    if (root := file_root(uri)) is not None and not root.is_dir():
        raise RequestError(f"{uri}: no such directory: expected the output of a job")
    return Collector(store, older_than).run(dry_run=dry_run)


@dataclass
class Collector:
    """One prune of one output."""

    store: ObjectStore
    age: timedelta
    removed: dict[str, Tally] = field(default_factory=lambda: dict.fromkeys(KINDS, Tally()))

    def __post_init__(self) -> None:
        self._workspace = Workspace(self.store)
        # Once, at the beginning: what is used from now on is young for all of this prune.
        self._now: datetime = self.store.now()
        self._read: dict[ObjectInfo, frozenset[str]] = {}
        self._lock = threading.Lock()

    @property
    def total(self) -> Tally:
        """What was removed so far."""
        return sum(self.removed.values(), Tally())

    def run(self, *, dry_run: bool) -> Pruned:
        """Everything, in the order that is safe."""
        found = self.survey()  # reads every record, so it comes before the first delete
        for stale in self.store.stale_writes(self.age):
            if dry_run or self.store.abort_write(stale):
                self._count(UNFINISHED, stale.size)
        if dry_run:
            for target in found.targets:
                for info in target.objects:
                    self._count(target.kind, info.size)
        else:
            self._sweep(lambda survey: [target for target in survey.targets if target.kind == RECORDS])
            self._sweep(lambda survey: [target for target in survey.targets if target.kind != RECORDS])
        return Pruned(self.store.uri, self.age, dry_run, self.removed, self.total, found.left)

    def survey(self, *, records_stay: bool = False) -> Survey:
        """What is there and old. records_stay: whether old records still hold their blobs."""
        groups: dict[tuple[str, str], list[ObjectInfo]] = {}
        left: list[str] = []
        records: list[ObjectInfo] = []
        for info in self.store.list():
            if info.key.startswith(f"{COMMITS}/") and info.key.endswith(".json"):
                records.append(info)
            kind, name = _place(info.key)
            if kind is None:
                left.append(info.key)
            else:
                groups.setdefault((kind, name), []).append(info)
        named = self._named(records, records_stay)
        targets: list[Target] = []
        for (kind, name), objects in groups.items():
            paths = [info.key.removeprefix(name) for info in objects]
            if kind == _ARTIFACTS and DOCUMENT not in paths and not any(map(_MARK.fullmatch, paths)):
                left += [info.key for info in objects]
            elif self._may_go(kind, objects, paths, named):
                last = sorted(objects, key=lambda info: _MARK.fullmatch(info.key.removeprefix(name)) is not None)
                targets.append(Target(kind, name, tuple(last)))
        return Survey(tuple(targets), tuple(sorted(left)))

    def _may_go(self, kind: str, objects: list[ObjectInfo], paths: list[str], named: frozenset[str]) -> bool:
        if kind == _KEPT or (kind == _ARTIFACTS and DOCUMENT in paths):
            return False
        if kind == _BLOBS and objects[0].key.rpartition("/")[2] in named:
            return False
        if kind == _PRUNES:  # none is of use when it has lapsed
            return all(self._now - info.modified > LAPSE for info in objects)
        return all(map(self._old, objects))

    def _old(self, info: ObjectInfo) -> bool:
        return self._now - info.modified >= self.age

    def _named(self, records: list[ObjectInfo], records_stay: bool) -> frozenset[str]:
        """Names of the blobs that are referred to. Every record is read, those that go too: one that is broken tells that
        something is wrong here."""
        with ThreadPoolExecutor(REQUESTS, "prune") as threads:
            names = list(threads.map(self._names_of, records))
        standard = {info.key for info in records if _place(info.key)[0] == RECORDS and self._old(info)}
        held = [part for info, part in zip(records, names, strict=True) if records_stay or info.key not in standard]
        return frozenset().union(*held)

    def _names_of(self, info: ObjectInfo) -> frozenset[str]:
        if info not in self._read:
            try:
                data = self.store.read(info.key)
            except ObjectNotFoundError:  # another prune was first
                return frozenset()
            self._read[info] = blob_names(data, self.store.uri_of(info.key))
        return self._read[info]

    def _sweep(self, chosen: Callable[[Survey], list[Target]]) -> None:
        """Removes targets: written on a list, looked at again, deleted as long as the list's time allows; and again."""
        while wanted := {target.name for target in chosen(self.survey(records_stay=True))}:
            before = self.total
            with self._workspace.condemned(sorted(wanted)) as in_time, ThreadPoolExecutor(REQUESTS, "prune") as threads:
                still = [target for target in chosen(self.survey(records_stay=True)) if target.name in wanted]
                if all(list(threads.map(lambda target: self._remove(target, in_time), still))):
                    return
            if self.total == before:
                raise StorageError(f"prune {self.store.uri}: the store is too slow: nothing was removed in time")

    def _remove(self, target: Target, in_time: Callable[[], bool]) -> bool:
        for info in target.objects:
            if not in_time():
                return False
            self.store.delete(info.key)
            self._count(target.kind, info.size)
        return True

    def _count(self, kind: str, size: int) -> None:
        with self._lock:
            self.removed[kind] += Tally(1, size)


def _place(key: str) -> tuple[str | None, str]:
    """The kind of an object by its key, None when it is not known, and what it is removed with."""
    for kind, pattern in _PLACES:
        if (match := pattern.fullmatch(key)) is not None:
            return kind, (match[1] if pattern.groups else key)
    return None, key


def blob_names(record: bytes, uri: str) -> frozenset[str]:
    """Names of the blobs that a record may refer to: every text of 64 hex digits in it. IntegrityError naming `uri` for what
    is no JSON object, or where what should be a blob is none."""
    try:
        values: list[object] = [parse_object(record, file=uri, max_values=MAX_VALUES)]
    except CheckpointError as error:
        raise IntegrityError(f"{error}: a damaged record may refer to any blob, so nothing was removed") from error
    names: set[str] = set()
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if Blob.model_fields.keys() <= value.keys() and not _NAME.fullmatch(str(value["sha256"])):
                raise IntegrityError(f"{uri}: sha256: {value['sha256']!r}: expected 64 hex digits; nothing was removed")
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and _NAME.fullmatch(value):
            names.add(value)
    return frozenset(names)
