"""Small decisions of the orchestrator, each a class that answers one question."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from counterweight.workers.errors import CounterweightError, RequestError, SurroundingsError

STALE = timedelta(days=7)
"""Age at which what nobody used cannot belong to a job that runs: no run of a job is longer."""


class Resume(Enum):
    """What a run takes over of what earlier runs have finished in its output."""

    AUTO = "auto"
    """What it can."""
    REQUIRED = "required"
    """At least one block, or it is refused."""
    NEVER = "never"
    """Nothing: all work is done anew, and no other run, earlier or beside it, shares any of it."""


class Verdict(Enum):
    """What to do about a failed task."""

    RETRY = "retry"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task failed. worker_died: the process is gone and with it whatever it held."""

    error: BaseException
    worker_died: bool


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Is a failed task tried again?

    A dead worker and failing surroundings (storage) may mend: up to `attempts` tries in all. A wrong request cannot,
    and an error that we did not raise on purpose is a defect that a retry would only repeat.
    """

    attempts: int = 3

    def judge(self, failure: Failure, tries: int) -> Verdict:
        """tries: how often the task has been tried, this time included."""
        if isinstance(failure.error, RequestError):
            return Verdict.FAIL
        mendable = failure.worker_died or isinstance(failure.error, SurroundingsError)
        return Verdict.RETRY if mendable and tries < self.attempts else Verdict.FAIL


@dataclass(frozen=True, slots=True)
class Placement:
    """Which block is a worker's next, when several could be?

    Its own half-done block first, because it holds the statistics in memory; then the oldest half-done block whose
    holder died; then the next block of the chain, because later blocks wait for it.
    """

    def choose(self, worker: int, held: dict[int, int], orphans: Collection[int], chain: Collection[int]) -> int | None:
        """held: block -> the worker that holds its statistics. orphans: half-done blocks without a holder. chain:
        blocks whose first half can start. Returns a block, or None when there is nothing for this worker."""
        own = [block for block, holder in held.items() if holder == worker]
        for candidates in (own, orphans, chain):
            if candidates:
                return min(candidates)
        return None


def describe(error: BaseException) -> str:
    """One line for the user; an error that was not raised on purpose shows its type."""
    if isinstance(error, CounterweightError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
