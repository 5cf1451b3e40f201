"""MLflow: a run of its own for each artifact, with what was asked for, what was measured, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from counterweight.pipeline.events import ArtifactPublished, Event, JobStarted
from counterweight.workers.errors import SurroundingsError
from counterweight.workers.metrics import METRICS

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from counterweight.pipeline.artifact import ArtifactDocument

MAX_VALUE = 500
"""Characters of a parameter; MLflow takes 6000, people read less."""


class Tracking:
    """A reader that tells MLflow of what was published. client: of a tracking server; experiment: that runs go to; note: told
    of what failed, which the job does not; errors: that the client raises."""

    def __init__(
        self, client: MlflowClient, experiment: str, note: Callable[[str], None], errors: tuple[type[Exception], ...]
    ) -> None:
        self._client, self._experiment, self._note = client, experiment, note
        self._errors: tuple[type[Exception], ...] = (*errors, SurroundingsError)
        self._name, self._begun = "", 0.0

    def on(self, event: Event) -> None:
        """Takes in an event."""
        match event:
            case JobStarted(name=name):
                self._name, self._begun = name, event.time
            case ArtifactPublished(uri=uri, existing=False):
                try:
                    self._publish(uri, event.time)
                except self._errors as error:
                    self._note(f"MLflow was not told of {uri}: {' '.join(str(error).split())[:MAX_VALUE]}")

    def end(self) -> None:
        """Everything was told at the publication."""

    def _publish(self, uri: str, at: float) -> None:
        from counterweight.pipeline.artifact import REPORT, REPORT_PAGE, read_document
        from counterweight.workers.storage import open_store

        store = open_store(uri)
        document = read_document(store)
        client = self._client
        known = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if known is None else known.experiment_id
        tags = {"counterweight.artifact": uri, "counterweight.id": document.id}
        run = client.create_run(experiment, int(1000 * self._begun), tags, run_name=self._name).info.run_id
        for name, value in parameters(document.recipe):
            client.log_param(run, name, value[:MAX_VALUE])
        for name, number in measured(document):
            client.log_metric(run, name, number)
        for path in (REPORT, REPORT_PAGE):
            client.log_text(run, store.read(path).decode(), path)
        client.set_terminated(run, end_time=int(1000 * at))


def parameters(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Path -> value of everything in a document: `recipe.weights.bits` -> `4`."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from parameters(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple) and value:
        for index, part in enumerate(value):
            yield from parameters(part, f"{path}.{index}")
    elif value not in (None, {}, [], ()):
        yield path, str(value)


def measured(document: ArtifactDocument) -> Iterator[tuple[str, float]]:
    """Name -> figure: `compensated.perplexity`, `bits_per_weight.total`."""
    for variant, quality in document.qualities.items():
        if quality is not None:
            for metric in METRICS:
                if (value := quality.of(metric)) is not None:
                    yield f"{variant}.{metric.name}", float(value)
    for part, bits in document.bits_per_weight.model_dump().items():
        if bits is not None:
            yield f"bits_per_weight.{part}", float(bits)
