"""A driver's metrics: those of the runs that it started, read from their events in the store whenever somebody asks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from counterweight.pipeline.event_store import EVENTS
from counterweight.pipeline.jobs.attempt import Attempt, Starter
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.tail import Tail
from counterweight.pipeline.manifest import job_id
from counterweight.pipeline.observability.run_metrics import RunMetrics
from counterweight.pipeline.segments import SegmentWriter
from counterweight.workers.errors import SurroundingsError
from counterweight.workers.storage import open_store


class DriverMetrics:
    """Wraps what starts attempts, and is a collector that the registry asks first, before what it has counted."""

    def __init__(self, start: Starter) -> None:
        self._start = start
        self._tail: Tail | None = None
        self._started, self._unread = 0, 0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._runs = RunMetrics(self.registry)

    def start(self, record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter) -> Attempt:
        """As what it wraps; from now on events of this job's runs are read, that are written from now on."""
        self._read()
        try:
            store = open_store(record.manifest.spec.output.uri, waits=False)
            self._tail = Tail(store, f"{EVENTS}/{job_id(record.manifest)}", since=store.now())
        except SurroundingsError:
            self._tail, self._unread = None, self._unread + 1
        self._started += 1
        return self._start(record, beside, log)

    def collect(self) -> Iterator[Metric]:
        """Reads what was written meanwhile; what it counts comes after."""
        self._read()
        yield CounterMetricFamily("counterweight_driver_attempts", "Attempts that this driver began.", self._started)
        yield CounterMetricFamily("counterweight_driver_unread", "Times that events could not be read.", self._unread)
        yield GaugeMetricFamily("counterweight_driver_up", "The driver lives.", 1)

    def describe(self) -> Sequence[Metric]:
        """Nothing is read for it, when this is registered."""
        return ()

    def _read(self) -> None:
        if self._tail is None:
            return
        try:
            for said in self._tail.lines():
                try:
                    self._runs.take(json.loads(said.line))
                except (ValueError, TypeError, KeyError):  # of another version
                    self._unread += 1
        except SurroundingsError:
            self._unread += 1
