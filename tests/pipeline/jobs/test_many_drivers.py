"""Many drivers at once, as threads in the place of machines: every job runs once, and never more at once than may."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from counterweight.pipeline.jobs.drive import until_idle
from counterweight.pipeline.jobs.queue import Limits
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.segments import SegmentWriter
from tests.pipeline.jobs.memory import record, submitted
from tests.pipeline.jobs.theatre import Scripted, Theatre


@pytest.fixture
def theatre() -> Theatre:
    return Theatre()


class TestManyDrivers:
    """Threads in the place of machines: every one drives until nothing is left."""

    def run(self, theatre: Theatre, drivers: int) -> None:
        lock = threading.Lock()
        guarded = [theatre.driver(f"driver {number}") for number in range(drivers)]

        def pause(seconds: float) -> None:
            with lock:
                theatre.store.advance(0.01)
            threading.Event().wait(0.001)

        for driver in guarded:
            driver.pause = pause
        with ThreadPoolExecutor(drivers) as threads:
            list(threads.map(lambda driver: driver.work(until_idle), guarded))

    def test_run_each_job_once(self, theatre: Theatre) -> None:
        submitted(theatre.jobs, *(f"job-{number}" for number in range(30)))
        self.run(theatre, 6)
        assert theatre.states() == [State.SUCCEEDED] * 30
        assert len(theatre.attempts) == len({id for id, _ in theatre.attempts}) == 30

    def test_never_run_more_than_may(self, theatre: Theatre) -> None:
        names = [f"job-{number}" for number in range(20)]
        for number, name in enumerate(names):
            theatre.jobs.submit(record(name, tenant="ab"[number % 2], priority=number % 3))
        theatre.jobs.set_limits(Limits(concurrency=3, per_tenant=2))
        counted = Counting(theatre)
        self.run(theatre, 6)
        assert theatre.states() == [State.SUCCEEDED] * 20
        assert counted.most <= 3
        assert max(counted.most_of.values()) <= 2


class Counting:
    """Counts attempts that run at once, by the drivers' own starts and closes."""

    def __init__(self, theatre: Theatre) -> None:
        self.most, self.most_of = 0, dict.fromkeys("ab", 0)
        self._running: list[str] = []
        self._lock = threading.Lock()
        self._start = theatre.start
        theatre.start = self.start  # type: ignore[method-assign]

    def start(self, record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter) -> Scripted:
        attempt = self._start(record, beside, log)
        with self._lock:
            self._running.append(record.tenant)
            self.most = max(self.most, len(self._running))
            for tenant in self.most_of:
                self.most_of[tenant] = max(self.most_of[tenant], self._running.count(tenant))
        close = attempt.close

        def closed() -> None:
            with self._lock:
                self._running.remove(record.tenant)
            close()

        attempt.close = closed  # type: ignore[method-assign]
        return attempt
