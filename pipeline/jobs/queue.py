"""Which jobs may start: a pure function of what is known of all jobs.

Order: a job's turn is the time of its submission, an hour earlier for each step of its priority. So among jobs of the same hour
priority decides, and none starves: whoever is submitted later than `HIGHEST_PRIORITY` allows for is behind.

A job that is over its tenant's or its batch's bound stands aside and holds nobody up. So does one whose blocks another job's
run compresses, until the first of those that share a calibration has succeeded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import Field

from counterweight.pipeline.jobs.record import BatchPart, Tenant
from counterweight.pipeline.jobs.states import State
from counterweight.workers.config import Config

STEP = timedelta(hours=1)
"""By how much one step of priority is ahead."""

Bound = Annotated[int, Field(ge=0, le=100_000)]


class Limits(Config):
    """limits.json. concurrency: jobs at once; per_tenant: of one tenant; tenants: of those that have a bound of their own.
    None: no bound; 0: none starts."""

    version: Literal[1] = 1
    concurrency: Bound | None = None
    per_tenant: Bound | None = None
    tenants: dict[Tenant, Bound] = Field(default_factory=dict)

    def of_tenant(self, tenant: str) -> int | None:
        return self.tenants.get(tenant, self.per_tenant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """What the queue knows of a job. submitted: by the store's clock."""

    id: str
    state: State
    submitted: datetime
    priority: int = 0
    tenant: str = "default"
    batch: BatchPart | None = None

    @property
    def turn(self) -> tuple[datetime, str]:
        """Whoever has the smaller one is first."""
        return self.submitted - self.priority * STEP, self.id


def in_order(entrants: Iterable[Entrant]) -> list[Entrant]:
    """All that wait for somebody who drives them, whether or not there is a place for them: those first that hold one already,
    because their driver died."""
    ready = (entrant for entrant in entrants if entrant.state.ready)
    return sorted(ready, key=lambda entrant: (not entrant.state.active, entrant.turn))


def startable(entrants: Sequence[Entrant], limits: Limits) -> list[str]:
    """Ids of the jobs that may start now, all of them at once, in order."""
    places = _Places(limits, entrants)
    return [entrant.id for entrant in in_order(entrants) if entrant.state.active or places.take(entrant)]


def crowded(entrants: Sequence[Entrant], limits: Limits, id: str) -> bool:
    """Whether more jobs run than may, of all, of the tenant or of the batch of the job `id`, which runs."""
    (own,) = (entrant for entrant in entrants if entrant.id == id)
    others = [entrant for entrant in entrants if entrant.id != id]
    return not _Places(limits, others).take(own)


def given_up(entrants: Sequence[Entrant]) -> list[str]:
    """Ids of jobs that have not started and are to be cancelled, because more jobs of their batch failed than may."""
    failed = Counter(
        entrant.batch.id for entrant in entrants if entrant.batch is not None and entrant.state is State.FAILED
    )
    return [
        entrant.id
        for entrant in entrants
        if entrant.batch is not None
        and entrant.batch.max_failures is not None
        and failed[entrant.batch.id] > entrant.batch.max_failures
        and not entrant.state.terminal
        and not entrant.state.active
    ]


class _Places:
    """Counts places that are held."""

    def __init__(self, limits: Limits, entrants: Iterable[Entrant]) -> None:
        self._limits = limits
        self._held: Counter[tuple[str, str]] = Counter()
        entrants = list(entrants)
        self._calibrated = {_calibration(entrant) for entrant in entrants if entrant.state is State.SUCCEEDED}
        for entrant in entrants:
            if entrant.state.active:
                self._held.update(key for key, _ in self._bounds(entrant))

    def take(self, entrant: Entrant) -> bool:
        """Takes a place, where there is one."""
        bounds = self._bounds(entrant)
        if any(bound is not None and self._held[key] >= bound for key, bound in bounds):
            return False
        self._held.update(key for key, _ in bounds)
        return True

    def _bounds(self, entrant: Entrant) -> list[tuple[tuple[str, str], int | None]]:
        """What a job counts towards, and its bound."""
        bounds: list[tuple[tuple[str, str], int | None]] = [
            (("all", ""), self._limits.concurrency),
            (("tenant", entrant.tenant), self._limits.of_tenant(entrant.tenant)),
        ]
        if (batch := entrant.batch) is not None:
            bounds.append((("batch", batch.id), batch.concurrency))
            if batch.calibration is not None and _calibration(entrant) not in self._calibrated:
                bounds.append((("calibration", _calibration(entrant)), 1))
        return bounds


def _calibration(entrant: Entrant) -> str:
    """Of jobs that are compressed from one calibration; of other jobs, nothing that any job is asked for."""
    return "" if entrant.batch is None else f"{entrant.batch.id}/{entrant.batch.calibration}"


def compressed_beside(entrants: Iterable[Entrant], id: str) -> list[str]:
    """Ids of the jobs that wait and whose blocks the run of the job `id` compresses too, from its calibration, in order."""
    every = list(entrants)
    (own,) = (entrant for entrant in every if entrant.id == id)
    if own.batch is None or own.batch.calibration is None:
        return []
    waiting = sorted(
        (one for one in every if not one.state.active and not one.state.terminal), key=lambda one: one.turn
    )
    return [one.id for one in waiting if _calibration(one) == _calibration(own)]
