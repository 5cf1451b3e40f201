"""OpenTelemetry spans from the events of a run: the job, its stages, and below each the tasks that ended in it."""

from __future__ import annotations

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, StatusCode, set_span_in_context

from counterweight.pipeline.events import (
    ArtifactPublished,
    Event,
    FellBack,
    JobFailed,
    JobStarted,
    Note,
    StageEntered,
    TaskFinished,
    TaskRetried,
    TaskStarted,
)

NANO = 1_000_000_000


class Spans:
    """A reader that makes spans and gives them to an exporter, in a thread of its own. Of resource attributes and sampling
    OpenTelemetry's environment variables decide."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "counterweight"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("counterweight")
        self._job: Span | None = None
        self._stage: Span | None = None
        self._tasks: dict[str, Span] = {}

    def on(self, event: Event) -> None:
        """Takes in an event."""
        at = _nanoseconds(event)
        match event:
            case JobStarted(name=name, id=id, workers=workers):
                self._job = self._begun(
                    f"job {name}", at, {"counterweight.job": id, "counterweight.workers": workers}, None
                )
            case StageEntered(stage=stage):
                self._leave(at)
                self._stage = self._begun(f"stage {stage}", at, {}, self._job)
            case TaskStarted(task=task, task_kind=kind, worker=worker, block=block):
                about: dict[str, str | int] = {"counterweight.kind": kind, "counterweight.worker": worker}
                if block is not None:
                    about["counterweight.block"] = block
                self._tasks[task] = self._begun(task, at, about, self._stage or self._job)
            case TaskFinished(task=task):
                self._end_task(task, at, None)
            case TaskRetried(task=task, cause=cause):
                self._end_task(task, at, cause)
            case Note(text=text) | FellBack(text=text):
                self._told(event.kind, at, {"text": text})
            case ArtifactPublished(uri=uri):
                self._told(event.kind, at, {"uri": uri})
            case JobFailed(text=text):
                self._leave(at)
                if self._job is not None:
                    self._job.set_status(StatusCode.ERROR, text)

    def end(self) -> None:
        """Ends what is open and waits until it is sent."""
        for task in list(self._tasks):
            self._end_task(task, None, "the run ended")
        self._leave(None)
        if self._job is not None:
            self._job.end()
        self._provider.shutdown()

    def _begun(self, name: str, at: int, attributes: dict[str, str | int], parent: Span | None) -> Span:
        context = None if parent is None else set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, start_time=at, attributes=attributes)

    def _end_task(self, task: str, at: int | None, failed: str | None) -> None:
        span = self._tasks.pop(task, None)
        if span is not None:
            if failed is not None:
                span.set_status(StatusCode.ERROR, failed)
            span.end(at)

    def _leave(self, at: int | None) -> None:
        if self._stage is not None:
            self._stage.end(at)
            self._stage = None

    def _told(self, name: str, at: int, attributes: dict[str, str]) -> None:
        span = self._stage or self._job
        if span is not None:
            span.add_event(name, attributes, at)


def _nanoseconds(event: Event) -> int:
    return int(event.time * NANO)
