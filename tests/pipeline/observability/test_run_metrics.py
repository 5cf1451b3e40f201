"""Metrics and spans of a real run's events, a driver's metrics, and what happens to sinks that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from counterweight.pipeline.event_store import EVENTS, line_of
from counterweight.pipeline.events import (
    ArtifactPublished,
    BlockDone,
    Event,
    EventLog,
    FellBack,
    JobFailed,
    JobStarted,
    StageEntered,
    TaskFinished,
    TaskRetried,
    TaskStarted,
)
from counterweight.pipeline.jobs.attempt import Attempt, Exit
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.manifest import job_id
from counterweight.pipeline.observability.driver_metrics import DriverMetrics
from counterweight.pipeline.observability.run_metrics import RunMetrics
from counterweight.pipeline.observability.sinks import SINKS, sinks
from counterweight.pipeline.observability.spans import Spans
from counterweight.pipeline.observability.tracking import Tracking
from counterweight.pipeline.segments import SegmentWriter
from counterweight.workers.errors import RequestError
from counterweight.workers.storage.file import FileStore
from tests.inprocess import RecordedProgress
from tests.pipeline.jobs.memory import record
from tests.pipeline.jobs.theatre import Scripted
from tests.pipeline.service.test_service_batches import FILES, ID, artifact

STORY: Sequence[Event] = (
    JobStarted("tiny", "0" * 16, 2, time=100.0),
    TaskFinished("digest", "digest", 0, 1.0, time=101.0),
    StageEntered("blocks", time=110.0),
    TaskStarted("block 0 (block)", "block", 0, 0, time=110.0),
    TaskRetried("block 0 (block)", 0, 1, 3, "killed", True, time=112.0),
    TaskStarted("block 0 (block)", "block", 1, 0, time=112.0),
    TaskFinished("block 0 (block)", "block", 1, 8.0, 0, 5000, 700, time=120.0),
    BlockDone(0, 7.5, 1000, 0.2, 0.1, False, time=120.0),
    BlockDone(1, 7.5, 9000, 0.2, 0.1, True, time=120.0),
    FellBack("q_proj", "gptq", "not positive definite", time=120.0),
    StageEntered("publish", time=130.0),
)
PUBLISHED = ArtifactPublished("file:///out/tiny/1", False, time=131.0)


def told(metrics: RunMetrics, events: Sequence[Event]) -> None:
    for event in events:
        metrics.take(json.loads(line_of(event)))


def test_what_a_run_does_is_counted() -> None:
    registry = CollectorRegistry()
    told(RunMetrics(registry), [*STORY, PUBLISHED])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"counterweight_{name}", labels)

    assert value("workers") == 2
    assert value("task_seconds_sum", kind="block") == 8
    assert value("task_seconds_count", kind="digest") == 1
    assert (value("block_seconds_sum"), value("block_seconds_count"), value("block_peak_bytes")) == (7.5, 1, 1000)
    assert value("blocks_reused_total") == 1
    assert value("task_retries_total", worker_died="true") == 1
    assert value("fallbacks_total", step="gptq") == 1
    assert value("stage_seconds_total", stage="blocks") == 20
    assert value("stage_capacity_seconds_total", stage="blocks") == 40
    assert value("stage_worker_seconds_total", stage="blocks") == 8
    assert value("stage_seconds_total", stage="publish") == 1
    assert value("storage_bytes_total", stage="blocks", direction="read") == 5000
    assert value("storage_bytes_total", stage="blocks", direction="written") == 700
    assert value("runs_total", outcome="published") == 1


def test_spans_are_the_job_its_stages_and_their_tasks() -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    for event in (*STORY, JobFailed("GateError", "perplexity", False, time=131.0)):
        spans.on(event)
    spans.end()
    found: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    (job,), (stage,), tasks = found["job tiny"], found["stage blocks"], found["block 0 (block)"]
    assert job.parent is None
    assert stage.parent.span_id == job.context.span_id
    assert {task.parent.span_id for task in tasks} == {stage.context.span_id}
    assert [(task.start_time, task.end_time) for task in tasks] == [(110e9, 112e9), (112e9, 120e9)]
    assert [task.status.status_code for task in tasks] == [StatusCode.ERROR, StatusCode.UNSET]
    assert (stage.start_time, stage.end_time) == (110e9, 130e9)
    assert [event.name for event in stage.events] == ["fell_back"]
    assert job.status.description == "perplexity"
    assert tasks[0].attributes["counterweight.block"] == 0


def test_a_driver_serves_what_its_runs_have_written(tmp_path: Path) -> None:
    job = record().manifest
    job = job.model_copy(
        update={
            "spec": job.spec.model_copy(
                update={"output": job.spec.output.model_copy(update={"uri": tmp_path.as_uri()})}
            )
        }
    )
    own = record().model_copy(update={"manifest": job})
    store = FileStore(tmp_path)

    def start(record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter) -> Attempt:
        return Scripted(Exit(0))

    metrics = DriverMetrics(start)
    metrics.start(own, [], None)  # type: ignore[arg-type]
    key = f"{EVENTS}/{job_id(job)}/run/00001.jsonl"
    assert metrics.registry.get_sample_value("counterweight_block_seconds_count") == 0
    lines = b"".join(line_of(event) for event in STORY)
    store.write(key, lines)
    collected = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert collected["counterweight_block_seconds_count"] == 1
    assert collected["counterweight_driver_attempts_total"] == 1
    store.write(key, lines + b'{"kind": "task_finished"}\nno json\n' + line_of(PUBLISHED))
    collected = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert (collected["counterweight_runs_total"], collected["counterweight_driver_unread_total"]) == (1, 2)


@dataclass
class Client:
    """MLflow's, as far as it is used."""

    fails: bool = False
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    ended: bool = False

    class Made:
        experiment_id = "1"

        class info:
            run_id = "r"

    def get_experiment_by_name(self, name: str) -> object:
        if self.fails:
            raise OSError("no route to host")
        return self.Made

    def create_run(self, experiment: str, start: int, tags: dict[str, str], run_name: str) -> object:
        self.tags, self.name = tags, run_name
        return self.Made

    def log_param(self, run: str, name: str, value: str) -> None:
        self.params[name] = value

    def log_metric(self, run: str, name: str, value: float) -> None:
        self.metrics[name] = value

    def log_text(self, run: str, text: str, path: str) -> None:
        self.texts[path] = text

    def set_terminated(self, run: str, end_time: int) -> None:
        self.ended = True


def test_mlflow_is_told_of_what_was_published(tmp_path: Path) -> None:
    quality = {"perplexity": 12.5, "kl": 0.1, "top1_agreement": 0.9}
    uri = artifact(tmp_path, files={**FILES, "report/report.json": b"{}", "report/report.html": b"<p>"})
    place = tmp_path / "tiny" / ID / "artifact.json"
    recipe = {"recipe": {"weights": {"bits": 4}, "transforms": [{"kind": "rotation"}], "tuning": None}}
    place.write_text(json.dumps({**json.loads(place.read_text()), "compensated": quality, "recipe": recipe}))
    client, notes = Client(), list[str]()
    tracking = Tracking(client, "tests", notes.append, (OSError,))  # type: ignore[arg-type]
    events = (JobStarted("tiny", "0" * 16, 1), ArtifactPublished(uri, False))
    for event in events:
        tracking.on(event)
    assert client.params == {"recipe.weights.bits": "4", "recipe.transforms.0.kind": "rotation"}
    assert (client.metrics["compensated.perplexity"], client.metrics["bits_per_weight.total"]) == (12.5, 4)
    assert client.texts == {"report/report.json": "{}", "report/report.html": "<p>"}
    assert (client.tags["counterweight.artifact"], client.name, client.ended) == (uri, "tiny", True)
    client.fails = True
    for event in events:
        tracking.on(event)
    assert notes == [f"MLflow was not told of {uri}: no route to host"]


def test_sinks_are_named_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="COUNTERWEIGHT_SINKS: 'statsd': expected otel, mlflow"):
        list(sinks({SINKS: "statsd"}, lambda text: None))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RequestError, match=r"expected pip install 'counterweight\[mlflow\]'"):
        list(sinks({SINKS: "mlflow"}, lambda text: None))
    assert list(sinks({}, lambda text: None)) == []
    (spans,) = sinks({SINKS: " otel,"}, lambda text: None)
    with EventLog(RecordedProgress(), spans):
        pass
