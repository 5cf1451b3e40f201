"""Prometheus metrics of runs, counted from their events."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


class RunMetrics:
    """Reads events, of one run after the other, as they are stored: kind and fields. Kinds that it does not know are left out.

    Work is counted where it ends: utilisation of a stage is its worker seconds by workers times its seconds.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tasks = Histogram(
            "counterweight_task_seconds", "Seconds of tasks, by kind.", ["kind"], buckets=SECONDS, registry=registry
        )
        self._blocks = Histogram(
            "counterweight_block_seconds",
            "Worker seconds of compressed blocks.",
            buckets=SECONDS,
            registry=registry,
        )
        self._reused = Counter(
            "counterweight_blocks_reused", "Blocks that earlier runs had finished.", registry=registry
        )
        self._peak = Gauge(
            "counterweight_block_peak_bytes", "Most memory that a block of the last run took.", registry=registry
        )
        self._retries = Counter(
            "counterweight_task_retries", "Tasks that were tried again.", ["worker_died"], registry=registry
        )
        self._fallbacks = Counter(
            "counterweight_fallbacks", "Departures from a recipe, by step.", ["step"], registry=registry
        )
        self._stage = Counter("counterweight_stage_seconds", "Seconds of stages.", ["stage"], registry=registry)
        self._capacity = Counter(
            "counterweight_stage_capacity_seconds",
            "Seconds of stages times their workers.",
            ["stage"],
            registry=registry,
        )
        self._busy = Counter(
            "counterweight_stage_worker_seconds",
            "Seconds of tasks that ended in a stage.",
            ["stage"],
            registry=registry,
        )
        self._traffic = Counter(
            "counterweight_storage_bytes",
            "Bytes that tasks, by the stage in which they ended, read from stores and wrote to them.",
            ["stage", "direction"],
            registry=registry,
        )
        self._workers = Gauge("counterweight_workers", "Workers of the last run.", registry=registry)
        self._ends = Counter("counterweight_runs", "Runs that ended, by how.", ["outcome"], registry=registry)
        self._current, self._since, self._size = "", 0.0, 0.0

    def take(self, event: dict[str, object]) -> None:
        """Takes in an event. ValueError, TypeError and KeyError for one that is none."""
        time, kind = _number(event, "time"), event["kind"]
        if kind == "job_started":
            self._size = _number(event, "workers")
            self._workers.set(self._size)
            self._current, self._since = "", time
        elif kind == "stage_entered":
            self._leave(time, str(event["stage"]))
        elif kind == "task_finished":
            seconds = _number(event, "seconds")
            stage = self._current or "opening"
            self._tasks.labels(str(event["task_kind"])).observe(seconds)
            self._busy.labels(stage).inc(seconds)
            for direction in ("read", "written"):
                self._traffic.labels(stage, direction).inc(_number(event, f"{direction}_bytes"))
        elif kind == "task_retried":
            self._retries.labels(str(bool(event["worker_died"])).lower()).inc()
        elif kind == "block_done":
            self._block(event)
        elif kind == "fell_back":
            self._fallbacks.labels(str(event["step"])).inc()
        elif kind in ("artifact_published", "job_failed"):
            self._leave(time, "")
            self._ends.labels("published" if kind == "artifact_published" else str(event["error"])).inc()

    def _block(self, event: dict[str, object]) -> None:
        if event["reused"]:
            self._reused.inc()
            return
        self._blocks.observe(_number(event, "seconds"))
        self._peak.set(_number(event, "peak_bytes"))

    def _leave(self, time: float, stage: str) -> None:
        seconds = max(time - self._since, 0.0)
        if self._current:
            self._stage.labels(self._current).inc(seconds)
            self._capacity.labels(self._current).inc(seconds * self._size)
        self._current, self._since = stage, time


def _number(event: dict[str, object], name: str) -> float:
    value = event[name]
    if not isinstance(value, int | float):
        raise TypeError(f"event {event['kind']}: {name}: {value!r}: expected a number")
    return float(value)
