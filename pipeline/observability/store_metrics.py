"""Prometheus metrics of a job store, computed from its records whenever somebody asks: any instance says the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.journal import Ended, Leased
from counterweight.pipeline.jobs.queue import Limits
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import queue_of


@dataclass(frozen=True, slots=True, eq=False)
class StoreMetrics:
    """A collector of what these jobs are now. jobs: those that whoever asks may see; every: all, which decide who may start."""

    jobs: Sequence[Job]
    every: Sequence[Job]
    limits: Limits

    def collect(self) -> Iterator[Metric]:
        yield self._states()
        own = {job.id for job in self.jobs}
        for name, ids in queue_of(self.every, self.limits).items():
            text = "Jobs that wait for a driver." if name == "queue" else "Jobs that may start now."
            yield GaugeMetricFamily(f"counterweight_{name}_depth", text, sum(id in own for id in ids))
        yield GaugeMetricFamily("counterweight_drivers", "Drivers that have a job.", sum(job.live for job in self.jobs))
        yield self._attempts()
        yield self._waited()

    def _states(self) -> Metric:
        family = GaugeMetricFamily("counterweight_jobs", "Jobs, by state and tenant.", labels=["state", "tenant"])
        found = Counter((job.state, job.record.tenant) for job in self.jobs)
        for tenant in sorted({job.record.tenant for job in self.jobs}):
            for state in State:
                family.add_metric([state.value, tenant], found[state, tenant])
        return family

    def _attempts(self) -> Metric:
        family = CounterMetricFamily("counterweight_attempts", "Attempts that ended, by cause.", labels=["cause"])
        entries = [dated.entry for job in self.jobs for dated in job.journal]
        for cause, count in sorted(Counter(one.cause.value for one in entries if isinstance(one, Ended)).items()):
            family.add_metric([cause], count)
        return family

    def _waited(self) -> Metric:
        """From submission to the first lease."""
        family = CounterMetricFamily("counterweight_wait_seconds", "Seconds that jobs waited for their first driver.")
        firsts = [next((d.at for d in job.journal if isinstance(d.entry, Leased)), None) for job in self.jobs]
        waited = [
            (first - job.submitted).total_seconds()
            for job, first in zip(self.jobs, firsts, strict=True)
            if first is not None
        ]
        family.add_metric([], sum(waited))
        return family
