"""Spans over HTTP to a receiver that decodes OTLP with OpenTelemetry's own messages: no collector, but what one is sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from counterweight.pipeline.events import EventLog, JobFailed
from counterweight.pipeline.observability.sinks import SINKS, sinks
from tests.pipeline.observability.test_run_metrics import STORY


@contextmanager
def receiver(status: int = 200) -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A URL and what was sent to it. status: of its answers."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            plain = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
            received.append(ExportTraceServiceRequest.FromString(plain))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *values: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()


def tell() -> None:
    """A run that fails at a gate, told to the sinks that the environment names."""
    with EventLog(*sinks({SINKS: "otel"}, lambda text: None)) as events:
        for event in (*STORY, JobFailed("GateError", "perplexity", False, time=131.0)):
            events.emit(event)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_receiver_decodes_job_stages_and_tasks(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        tell()
    resources = [one for request in received for one in request.resource_spans]
    said = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert (said["service.name"], said["deployment.environment"]) == ("counterweight", "test")
    found: dict[str, list[Span]] = {}
    for span in (span for one in resources for scope in one.scope_spans for span in scope.spans):
        found.setdefault(span.name, []).append(span)
    (job,), (blocks,), tasks = found["job tiny"], found["stage blocks"], found["block 0 (block)"]
    assert {span.trace_id for spans in found.values() for span in spans} == {job.trace_id}
    assert (job.parent_span_id, blocks.parent_span_id) == (b"", job.span_id)
    assert {task.parent_span_id for task in tasks} == {blocks.span_id}
    assert (blocks.start_time_unix_nano, blocks.end_time_unix_nano) == (110 * 10**9, 130 * 10**9)
    assert sorted(task.status.code for task in tasks) == [Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR]
    assert (job.status.code, job.status.message) == (Status.STATUS_CODE_ERROR, "perplexity")


def test_a_receiver_that_refuses_costs_the_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver(400) as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        tell()
    assert received
