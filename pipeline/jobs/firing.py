"""When a schedule fires, and what becomes of each firing: pure functions of an expression, a time zone and a clock.

Firings are moments in UTC. Daylight saving is cron's: a time of day that a change skips fires right behind it, one that comes
twice fires once; expressions of every hour or minute follow the clock in UTC (cronsim, after Debian's cron).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim

from counterweight.pipeline.manifest.batch import Overlap

STAMP = "%Y%m%dT%H%MZ"
"""A firing's name."""

NUMBER = "%Y%m%d%H%M"
"""Behind the ids of what it submits."""


class Verdict(Enum):
    """What became of a firing."""

    STARTED = "started"
    SKIPPED = "skipped"
    """Jobs of the one before were not at their end."""
    SUPERSEDED = "superseded"
    """Nobody was there, and when somebody came a later one was due too."""


def firings(cron: str, zone: str, after: datetime) -> Iterator[datetime]:
    """Moments behind `after`, in UTC, without end. cron: five fields, checked by the manifest."""
    for moment in CronSim(cron, after.astimezone(ZoneInfo(zone))):
        found = moment.astimezone(UTC)
        if found > after:
            yield found


def following(cron: str, zone: str, after: datetime, count: int) -> list[datetime]:
    """The next `count` moments."""
    return list(islice(firings(cron, zone, after), count))


def due(cron: str, zone: str, after: datetime, now: datetime, deadline: timedelta) -> list[datetime]:
    """Moments behind `after`, up to now, that are at most `deadline` old: what is older is missed for good."""
    begin = max(after, now - deadline)
    return list(takewhile(lambda moment: moment <= now, firings(cron, zone, begin)))


def verdicts(moments: Sequence[datetime], overlap: Overlap, busy: bool) -> list[tuple[datetime, Verdict]]:
    """What becomes of moments that are due: the latest is started, once for all of them. busy: whether jobs of an earlier
    firing are not at their end."""
    if not moments:
        return []
    *earlier, latest = moments
    last = Verdict.SKIPPED if busy and overlap is Overlap.SKIP else Verdict.STARTED
    return [*((moment, Verdict.SUPERSEDED) for moment in earlier), (latest, last)]
