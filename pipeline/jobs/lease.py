"""Who drives a job: one at a time, for as long as it is heard of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import Cancel, Deleted, Ended, Leased
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.workers.errors import RequestError

LAPSE_SECONDS = 15.0
"""Without a beat for so long a driver counts as dead. Longer than a store's hiccup and a machine's busiest moment: a driver
that is taken for dead and lives loses its work, though it harms nobody's."""

BEAT_SECONDS = 2.0
"""Between two beats, and between two looks at whether the job was cancelled."""


class Standing(Enum):
    """What a holder is told about its lease. CANCELLED: it is to stop the work and end the job. LOST: somebody else drives, or
    the job is at its end; the holder stops the work and writes nothing."""

    HELD = "held"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to drive a job. number: of its entry in the journal, which also fences: an entry of a lease that was taken over
    is refused."""

    jobs: JobStore
    job: Job
    number: int

    @property
    def id(self) -> str:
        return self.job.id

    def beat(self) -> Standing:
        """Tells that the holder lives, and finds out how the lease stands. StorageError."""
        self.jobs.beat(self.id, self.number)
        job = self.jobs.get(self.id)
        if not self._held(job):
            return Standing.LOST
        return Standing.CANCELLED if _cancelled(job) else Standing.HELD

    def end(self, ended: Ended) -> bool:
        """Ends the attempt; False when the lease was lost. StorageError."""
        return self.jobs.append(self.id, ended, self._held) is not None

    def _held(self, job: Job) -> bool:
        return job.lease == self.number


def take(jobs: JobStore, id: str, holder: str, seconds: float = LAPSE_SECONDS) -> Lease | None:
    """The lease on a job that nobody drives, or whose driver is not heard of any more; None when somebody was faster. seconds:
    without a beat for so long it lapses. StorageError."""
    leased = Leased(holder=holder, seconds=seconds)
    number = jobs.append(id, leased, lambda job: job.state.ready)
    return None if number is None else Lease(jobs, jobs.get(id), number)


def cancel(jobs: JobStore, id: str, line: str = "") -> Job:
    """Cancels a job: one that nobody drives is at its end at once, another when its driver has stopped the work. One that is at
    its end stays as it is. RequestError when there is no such job."""
    jobs.append(id, Cancel(line=line), lambda job: not _cancelled(job))
    close(jobs, id, line)
    return jobs.get(id)


def close(jobs: JobStore, id: str, line: str = "") -> None:
    """Ends a job that is to be cancelled and that nobody drives."""
    jobs.append(id, Ended(cause=Cause.CANCELLED, line=line), lambda job: job.abandoned)


def delete(jobs: JobStore, id: str, line: str = "") -> Job:
    """Puts a job that is at its end out of sight, with what its runs said; its artifact stays. Done again, it ends what was
    begun. RequestError where there is no such job, and for one that is not at its end; StorageError."""
    if not jobs.get(id).state.terminal:
        raise NotAtEndError(f"job {id}: is not at its end: expected it to be cancelled first")
    jobs.append(id, Deleted(line=line), lambda job: job.state is not State.DELETED)
    for info in list(jobs.store.list(jobs.logs_of(id))):
        jobs.store.delete(info.key)
    return jobs.get(id)


class NotAtEndError(RequestError):
    """The job is not at its end."""


def _cancelled(job: Job) -> bool:
    return job.state is State.CANCELLING
