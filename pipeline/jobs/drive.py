"""Drives jobs of a store: takes one whose turn it is, runs it, writes down how it ended, takes the next.

Any number of drivers may do so at once, on any machines. They agree through the journals alone:

1. Read all jobs. Close those that are to be cancelled and that nobody drives.
2. Take the lease of the first that may start (`queue.startable`); jobs whose driver died come first.
3. Read all jobs again. When more run than may, because somebody else took another one meanwhile, give the lease back. Whoever
   takes a lease last sees all the others, so the bounds hold at every moment of work.
4. Run it, with a beat every few seconds that also tells of a cancel and of a lease that was lost.
5. Write its end: final, or to be repeated as `retries` has it.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from counterweight.pipeline.jobs.attempt import FLUSH_SECONDS, Attempt, Exit, Starter, without_credentials
from counterweight.pipeline.jobs.drivers import lacks
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import MAX_LINE, Ended
from counterweight.pipeline.jobs.lease import BEAT_SECONDS, LAPSE_SECONDS, Lease, Standing, cancel, close, take
from counterweight.pipeline.jobs.queue import compressed_beside, crowded, given_up, startable
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.retries import JobRetries
from counterweight.pipeline.jobs.states import Cause, State, cause_of
from counterweight.pipeline.jobs.store import JobStore, entrant_of
from counterweight.pipeline.segments import SegmentWriter
from counterweight.workers.errors import SurroundingsError

Enough = Callable[[Sequence[Job]], bool]
"""Whether a driver has done what it is there for, by all jobs."""


def until_ended(*ids: str) -> Enough:
    """When these jobs are at their end."""
    return lambda jobs: all(job.state.terminal for job in jobs if job.id in ids)


def until_idle(jobs: Sequence[Job]) -> bool:
    """When all jobs are at their end."""
    return all(job.state.terminal for job in jobs)


def never(jobs: Sequence[Job]) -> bool:
    """There may always be another job."""
    return False


def holder_name() -> str:
    """Who we are, for people."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"


@dataclass
class Driver:
    """start: begins an attempt. note: told what people should see. meanwhile: done every few seconds, whether or not there is
    a job: schedules fire. gpus: that workers can have; None: whatever the cluster has. pause: sleeps for so many seconds.
    beat: seconds between two beats. lapse: seconds without one after which others take over."""

    jobs: JobStore
    start: Starter
    note: Callable[[str], None]
    retries: JobRetries = field(default_factory=JobRetries)
    meanwhile: Callable[[], None] = lambda: None
    gpus: int | None = None
    pause: Callable[[float], None] = time.sleep
    beat: float = BEAT_SECONDS
    lapse: float = LAPSE_SECONDS
    holder: str = field(default_factory=holder_name)
    _said: str = ""

    def work(self, enough: Enough) -> None:
        """Until it is enough. A store that fails is waited for."""
        while True:
            try:
                self.meanwhile()
                jobs = self.jobs.all()
                if enough(jobs):
                    return
                self._close(jobs)
                lease = self._next(jobs)
            except SurroundingsError as error:
                self._say(f"waiting: {error}")
                lease = None
            if lease is None:
                self.pause(self.beat * random.uniform(0.5, 1.0))
            else:
                self.drive(lease)

    def _close(self, jobs: Sequence[Job]) -> None:
        """Ends what is to be cancelled and what a batch has given up."""
        for job in jobs:
            if job.abandoned:
                close(self.jobs, job.id)
        for id in given_up([entrant_of(job) for job in jobs]):
            cancel(self.jobs, id, "too many jobs of its batch failed")

    def _next(self, jobs: Sequence[Job]) -> Lease | None:
        """The lease of the first job that may start and that nobody else takes."""
        left = self._left(jobs)
        # One that has a place already keeps it; one that waits takes none from those that can start here.
        counted = [entrant_of(job) for job in jobs if job.state.active or job.id not in left]
        for id in startable(counted, self.jobs.limits()):
            if id in left:
                continue
            lease = take(self.jobs, id, self.holder, self.lapse)
            if lease is None:
                continue
            if crowded([entrant_of(job) for job in self.jobs.all()], self.jobs.limits(), id):
                lease.end(Ended(cause=Cause.RELEASED, again=True, line="another job was faster"))
                return None
            return lease
        return None

    def _left(self, jobs: Sequence[Job]) -> set[str]:
        """Ids of the jobs that wait and that this driver's devices are not enough for."""
        found = {job.id: lack for job in jobs if job.state.ready and (lack := lacks(job.record.manifest, self.gpus))}
        for lack in list(found.values())[:1]:
            self._say(f"left to other drivers: {', '.join(list(found)[:5])}: {lack}")
        return set(found)

    def drive(self, lease: Lease) -> None:
        """One attempt under a lease, to its end. What interrupts this process gives the job back."""
        lapsed = lease.job.failures.get(Cause.LAPSED, 0)
        if lapsed > self.retries.budgets.get(Cause.LAPSED, 0):  # the job may be what kills them
            lease.end(Ended(cause=Cause.LAPSED, line=f"{lapsed} of its drivers died"))
            return
        self.note(f"job {lease.id}: driven by {self.holder}")
        prefix = self.jobs.log_prefix(lease.id, lease.number)
        log = SegmentWriter(
            self.jobs.store, prefix, f"log of job {lease.id}", self.note, suffix="log", seconds=FLUSH_SECONDS
        )
        log.begin()
        try:
            attempt = self.start(lease.job.record, self._beside(lease.job), log)
        except (OSError, SurroundingsError) as error:
            log.end()
            self._end(lease, self._ended(lease.job, Standing.HELD, Exit(SurroundingsError.exit_code, str(error))))
            return
        try:
            standing, ended = self._watch(lease, attempt)
        except KeyboardInterrupt:
            attempt.terminate()
            while attempt.poll() is None:
                self.pause(self.beat / 4)
            with suppress(SurroundingsError):
                lease.end(Ended(cause=Cause.RELEASED, again=True, line="its driver was asked to end"))
            raise
        finally:
            attempt.close()
        if standing is Standing.LOST:
            self.note(f"job {lease.id}: somebody else drives it now")
            return
        self._end(lease, self._ended(lease.job, standing, ended))

    def _beside(self, job: Job) -> list[JobRecord]:
        """Jobs whose blocks are compressed from this one's calibration. StorageError."""
        if job.record.batch is None or job.record.batch.calibration is None:
            return []
        every = {one.id: one for one in self.jobs.all()}
        ids = compressed_beside([entrant_of(one) for one in every.values()], job.id)
        return [every[id].record for id in ids]

    def _watch(self, lease: Lease, attempt: Attempt) -> tuple[Standing, Exit]:
        """Until the attempt is over; the first news of a cancel or of a lost lease stops it."""
        standing = Standing.HELD
        while (ended := attempt.poll()) is None:
            self.pause(self.beat)
            try:
                found = lease.beat()
                self.meanwhile()
            except SurroundingsError as error:
                # The run has its own patience. Others who reach the store may take over, and the next beat will tell.
                self._say(f"job {lease.id}: no beat: {error}")
                continue
            if found is not Standing.HELD:
                standing = found
                attempt.terminate()
        return standing, ended

    def _say(self, text: str) -> None:
        """Notes what may be the case for hours, once."""
        if text != self._said:
            self._said = text
            self.note(text)

    def _ended(self, job: Job, standing: Standing, ended: Exit) -> Ended:
        cause = cause_of(ended.code)
        if standing is Standing.CANCELLED and cause is not Cause.DONE:
            return Ended(cause=Cause.CANCELLED, exit_code=ended.code, line="stopped; finished blocks are kept")
        delay = self.retries.delay(cause, job.failures)
        return Ended(
            cause=cause,
            again=delay is not None,
            delay=delay or 0.0,
            exit_code=ended.code,
            line="" if cause is Cause.DONE else without_credentials(ended.line)[:MAX_LINE],
            artifact=ended.artifact,
        )

    def _end(self, lease: Lease, ended: Ended) -> None:
        """Writes the end down, for which a store that is away is waited for."""
        while True:
            try:
                written = lease.end(ended)
                break
            except SurroundingsError as error:
                self._say(f"job {lease.id}: its end could not be written: {error}")
                self.pause(self.beat)
        state = State.WAITING if ended.again else ended.cause.ends
        self.note(f"job {lease.id}: {state.value if written else 'its lease was lost'}: {ended.line}".rstrip(": "))
