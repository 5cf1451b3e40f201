"""A job as it stands now: a pure function of its record, its journal, the last beat and the store's clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from counterweight.pipeline.jobs.journal import Cancel, Deleted, Ended, Entry, Leased
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.workers.errors import SurroundingsError


@dataclass(frozen=True, slots=True)
class Dated:
    """An entry of a journal. at: when it was written, by the store's clock."""

    entry: Entry
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """submitted: when. journal: its entries, numbered from 1. lease: number of the entry under which it is driven, None for
    nobody. live: whether its holder was heard of lately. due: not before then. failures: how often attempts ended for a cause
    after which they were repeated, lapsed leases included."""

    record: JobRecord
    submitted: datetime
    journal: tuple[Dated, ...] = ()
    state: State = State.QUEUED
    lease: int | None = None
    live: bool = False
    due: datetime | None = None
    failures: Mapping[Cause, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.record.id

    def listed(self, state: State | None) -> bool:
        """Whether it is among the jobs in a state; None: among all that are in sight."""
        return self.state is state if state is not None else self.state is not State.DELETED

    @property
    def ended(self) -> Ended | None:
        """How the last attempt ended; None while there is none or another one runs."""
        past = (dated.entry for dated in reversed(self.journal))
        last = next((entry for entry in past if not isinstance(entry, Cancel | Deleted)), None)
        return last if isinstance(last, Ended) else None

    @property
    def exit_code(self) -> int:
        """For whoever waited for it: that of its run where it failed, 4 where there is none, 0 otherwise."""
        if self.state is not State.FAILED or self.ended is None:
            return 0
        code = self.ended.exit_code
        return code if code is not None and code > 0 else SurroundingsError.exit_code

    @property
    def holder(self) -> str | None:
        """Who drives it, or did until it was not heard of any more."""
        entry = None if self.lease is None else self.journal[self.lease - 1].entry
        return entry.holder if isinstance(entry, Leased) else None

    @property
    def abandoned(self) -> bool:
        """Whether it is to be cancelled and nobody is there who would stop it."""
        return self.state is State.CANCELLING and not self.live


def fold(
    record: JobRecord,
    submitted: datetime,
    journal: Sequence[Dated],
    beats: Mapping[int, datetime],
    now: datetime,
) -> Job:
    """beats: number of a lease -> when its holder was last heard of."""
    lease: int | None = None
    last: Dated | None = None
    cancelled = deleted = False
    failures: Counter[Cause] = Counter()
    for number, dated in enumerate(journal, 1):
        match dated.entry:
            case Leased():
                failures[Cause.LAPSED] += lease is not None
                lease = number
            case Cancel():
                cancelled = True
            case Deleted():
                deleted = True
            case Ended(cause=cause, again=again):
                failures[cause] += again
                lease, last = None, dated
    live = lease is not None and _heard(journal[lease - 1], beats.get(lease), now)
    due = last.at + timedelta(seconds=last.entry.delay) if last and isinstance(last.entry, Ended) else submitted
    return Job(
        record=record,
        submitted=submitted,
        journal=tuple(journal),
        state=State.DELETED if deleted else _state(last, lease, live, cancelled, now >= due),
        lease=lease,
        live=live,
        due=due,
        failures={cause: count for cause, count in failures.items() if count},
    )


def _heard(leased: Dated, beat: datetime | None, now: datetime) -> bool:
    assert isinstance(leased.entry, Leased)
    heard = leased.at if beat is None else max(leased.at, beat)
    return now - heard <= timedelta(seconds=leased.entry.seconds)


def _state(last: Dated | None, lease: int | None, live: bool, cancelled: bool, due: bool) -> State:
    ended = last.entry if last is not None else None
    if isinstance(ended, Ended) and not ended.again:
        return ended.cause.ends
    if cancelled:
        return State.CANCELLING
    if lease is not None:
        return State.RUNNING if live else State.LAPSED
    return State.QUEUED if due else State.WAITING
