"""Drivers in a theatre: attempts are scripts, pauses move the clock, the store is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from counterweight.pipeline.jobs.attempt import Exit
from counterweight.pipeline.jobs.drive import Driver
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.segments import SegmentWriter
from tests.pipeline.jobs.memory import MemoryStore

OK = Exit(0, artifact="file:///out/tiny/1")
ANOTHER = Exit(4, "503 SlowDown")


@dataclass
class Scripted:
    """An attempt that ends as it was told after so many looks, or 143 when it is asked to."""

    end: Exit
    looks: int = 1
    asked: bool = False
    closed: bool = False

    def poll(self) -> Exit | None:
        if self.asked:
            return Exit(143, "terminated")
        self.looks -= 1
        return self.end if self.looks < 0 else None

    def terminate(self) -> None:
        self.asked = True

    def close(self) -> None:
        self.closed = True


@dataclass
class Theatre:
    """A store, its jobs, and drivers whose pauses move the clock. ends: of the attempts that are started, in order; the last
    one repeats. during: called in each pause."""

    store: MemoryStore = field(default_factory=MemoryStore)
    ends: list[Exit] = field(default_factory=lambda: [OK])
    looks: int = 1
    during: Callable[[], None] = lambda: None
    attempts: list[tuple[str, Scripted]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beside: dict[str, list[str]] = field(default_factory=dict)
    """Of the last attempt at each job."""

    @property
    def jobs(self) -> JobStore:
        return JobStore(self.store)

    def driver(self, name: str = "a") -> Driver:
        return Driver(self.jobs, self.start, self.notes.append, pause=self.pause, beat=2.0, lapse=15.0, holder=name)

    def start(self, record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter) -> Scripted:
        self.beside[record.id] = [one.id for one in beside]
        attempt = Scripted(self.ends.pop(0) if len(self.ends) > 1 else self.ends[0], self.looks)
        self.attempts.append((record.id, attempt))
        log.append(b"begun\n")
        log.end()
        return attempt

    def pause(self, seconds: float) -> None:
        self.store.advance(seconds)
        self.during()

    def states(self) -> list[State]:
        return [job.state for job in self.jobs.all()]
