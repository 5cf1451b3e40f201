"""Drivers that stand by: what devices they have and what they said last, for whoever wonders why a job does not start.

_drivers/<nonce>.json    written again every half minute by a driver that lives; nothing is decided by it

A driver decides alone whether it can run a job. Jobs that none of those who were heard of lately can run say so.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import MAX_LINE
from counterweight.pipeline.jobs.store import JobStore, parsed
from counterweight.pipeline.manifest import CompressionJob
from counterweight.workers.config import Config
from counterweight.workers.errors import ObjectNotFoundError

DRIVERS = "_drivers"
NAME = rf"{DRIVERS}/[0-9a-f]{{16}}\.json"

ANNOUNCE_SECONDS = 30.0
GONE = timedelta(seconds=3 * ANNOUNCE_SECONDS)
"""Whoever was not heard of for so long does not stand by any more."""


class DriverRecord(Config):
    """gpus: of a machine that its workers can have; null: whatever the cluster has. said: its last line for people."""

    version: Literal[1] = 1
    holder: str
    gpus: int | None
    said: Annotated[str, Field(max_length=MAX_LINE)] = ""


_RECORD = TypeAdapter(DriverRecord)


@dataclass(frozen=True, slots=True)
class Standby:
    """A driver that lives. heard: when it was heard of."""

    record: DriverRecord
    heard: datetime


@dataclass
class Announcer:
    """Tells of a driver, now and then. said: what it says, to be told with the next announcement."""

    jobs: JobStore
    holder: str
    gpus: int | None
    said: str = ""
    _key: str = field(default_factory=lambda: f"{DRIVERS}/{secrets.token_hex(8)}.json")
    _due: float = 0.0

    def tick(self) -> None:
        """Announces where it is time. StorageError."""
        if time.monotonic() >= self._due:
            record = DriverRecord(holder=self.holder, gpus=self.gpus, said=self.said[:MAX_LINE])
            self.jobs.store.write(self._key, record.model_dump_json().encode())
            self._due = time.monotonic() + ANNOUNCE_SECONDS

    def close(self) -> None:
        """Is gone. StorageError."""
        self.jobs.store.delete(self._key)


def drivers(jobs: JobStore) -> list[Standby]:
    """Those that were heard of lately, by their names. StorageError."""
    now, found = jobs.store.now(), []
    for info in jobs.store.list(f"{DRIVERS}/"):
        if re.fullmatch(NAME, info.key) is None or now - info.modified > GONE:
            continue
        try:
            record = parsed(_RECORD, jobs.store.read(info.key), jobs.store.uri_of(info.key))
        except ObjectNotFoundError:  # it is gone since
            continue
        found.append(Standby(record, info.modified))
    return sorted(found, key=lambda one: one.record.holder)


def lacks(job: CompressionJob, gpus: int | None) -> str:
    """What a driver with so many GPUs lacks for a job; empty: nothing."""
    needed = job.spec.resources.gpus_per_worker
    if gpus is None or needed <= gpus:
        return ""
    return f"a worker needs {needed:g} GPU{'s' if needed > 1 else ''}: there {'is' if gpus == 1 else 'are'} {gpus or 'none'}"


def obstacle(job: CompressionJob, known: Sequence[Standby]) -> str | None:
    """Why none of the drivers that stand by can run a job; None where one can, and where none stands by at all: it may come."""
    reasons = [lacks(job, one.record.gpus) for one in known]
    if not reasons or not all(reasons):
        return None
    return f"no driver can run it: {', '.join(dict.fromkeys(reasons))}"


def obstacle_of(jobs: JobStore, job: Job) -> str | None:
    """As `obstacle`, of a job that waits for a driver; None of any other. StorageError."""
    return obstacle(job.record.manifest, drivers(jobs)) if job.state.ready else None


def gpus_here(environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """GPUs of this machine that its processes may use, as far as can be told without a library."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1", "NoDevFiles")])
    return len(list(proc.iterdir())) if proc.is_dir() else 0
