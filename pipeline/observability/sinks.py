"""Which further readers the events of a run have: those that `COUNTERWEIGHT_SINKS` names, with commas between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from counterweight.pipeline.events import Reader
from counterweight.workers.errors import RequestError

SINKS = "COUNTERWEIGHT_SINKS"

Note = Callable[[str], None]


def sinks(environment: Mapping[str, str], note: Note) -> Iterator[Reader]:
    """The readers. note: told of what a sink could not do, which never fails the job. RequestError for an unknown sink, and for
    one whose library is not installed: whoever names it relies on it."""
    for name in filter(None, (part.strip() for part in environment.get(SINKS, "").split(","))):
        if name not in _MAKERS:
            raise RequestError(f"{SINKS}: {name!r}: expected {', '.join(_MAKERS)}")
        try:
            yield _MAKERS[name](note)
        except ImportError as error:
            raise RequestError(
                f"{SINKS}: {name}: no module {error.name}: expected pip install 'counterweight[{_EXTRAS[name]}]'"
            ) from error


def _otel(note: Note) -> Reader:
    """Where spans go say OTEL_EXPORTER_OTLP_ENDPOINT and its siblings."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from counterweight.pipeline.observability.spans import Spans

    return Spans(OTLPSpanExporter())


def _mlflow(note: Note) -> Reader:
    """Which server say MLFLOW_TRACKING_URI and its siblings, which experiment MLFLOW_EXPERIMENT_NAME."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from counterweight.pipeline.observability.tracking import Tracking

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for the artifact's URI
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "counterweight")
    return Tracking(MlflowClient(), experiment, note, (MlflowException, OSError))


_MAKERS: Mapping[str, Callable[[Note], Reader]] = {"otel": _otel, "mlflow": _mlflow}
_EXTRAS = {"otel": "observability", "mlflow": "mlflow"}
