"""Validates a published artifact again, in this process, against the model it was made from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from counterweight.pipeline.artifact import REPORT, file_entry, open_artifact
from counterweight.pipeline.artifact.reader import parsed
from counterweight.pipeline.artifact.report import Quality, Report, quality
from counterweight.pipeline.model_source import open_model
from counterweight.workers.calibration.source import TextSource, TokenSource
from counterweight.workers.calibration.tokens import token_set
from counterweight.workers.config import first_problem
from counterweight.workers.errors import CheckpointError, RequestError
from counterweight.workers.keys import digest
from counterweight.workers.ledger import LEDGER
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.evaluate import Evaluate
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Workspace


def evaluate_artifact(
    uri: str,
    *,
    against: str | None = None,
    text: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    device: str = "cpu",
) -> dict[str, Quality]:
    """Variant -> quality, as in a report: baseline, quantized, compensated, and with residual stores compensated_prefill.

    What is not given is taken from the artifact's own report. RequestError when the report has no text to repeat, or
    when the model at hand is not the one that the artifact was made from.
    """
    if device not in ("cpu", "cuda"):
        raise RequestError(f"--device: {device!r}: expected cpu or cuda")
    for option, value, least in (("--windows", windows, 1), ("--sequence-length", sequence_length, 2)):
        if value is not None and value < least:
            raise RequestError(f"{option}: {value}: expected at least {least}")
    store, document = open_artifact(uri)
    data = store.read(REPORT, sha256=file_entry(store, document, REPORT).sha256)
    report = parsed(Report, store, REPORT, "a report", data)
    source = open_model(against or document.base_model.uri)
    worker = Worker("cuda" if device == "cuda" else "cpu", threads=len(os.sched_getaffinity(0)))
    digests = {name: found.sha256 for name, found in worker.run(Inspect(source.uri, source.tensors)).items()}
    if digest(digests) != document.base_model.digest:
        raise RequestError(
            f"{source.uri}: digest {digest(digests)[:16]}: expected {document.base_model.digest[:16]}, the model that "
            f"{document.name} was made from"
        )
    tokens = token_set(
        _text(text, report),
        source.tokenizer(),
        length=sequence_length or _reported_length(report),
        sequences=windows if windows is not None or text is not None else _reported_windows(report),
        sampling="consecutive",
        seed=0,
        field="--text",
    ).within(source.layout.vocabulary, "--text")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch).as_uri()
        blob = Workspace(open_store(place)).put_tensors({"input_ids": tokens.ids})
        original = Original(
            setting=Setting(
                source=source.uri,
                config=source.checkpoint.config,
                workspace=place,
                compute_dtype="float32",
                device="cuda" if device == "cuda" else "cpu",
            ),
            tensors=digests,
            tokens=blob,
            start=0,
            stop=tokens.sequences,
            dtype=report.validation_dtype,
        )
        found = worker.run(original)
        ledger = document.files[LEDGER].sha256
        record = worker.run(Evaluate(original=original, found=found, artifact=store.uri, ledger=ledger))
    return {variant: quality(windows) for variant, windows in record.windows.items()}


def _text(text: str | None, report: Report) -> TokenSource:
    if text is not None:
        return TextSource(uri=text)
    if report.validation is None:
        raise RequestError("--text: the artifact was published without validation: expected a text to measure on")
    try:
        source: TokenSource = TypeAdapter(TokenSource).validate_python(dict(report.validation.source))
    except ValidationError as error:
        raise CheckpointError(f"{REPORT}: validation.source: {first_problem(error)}") from error
    return source


def _reported_length(report: Report) -> int:
    length = (report.validation or report.calibration).sequence_length
    if length < 2:
        raise CheckpointError(f"{REPORT}: sequence_length: {length}: expected at least 2")
    return length


def _reported_windows(report: Report) -> int | None:
    if report.validation is None:
        return None
    if report.validation.sequences < 1:
        raise CheckpointError(f"{REPORT}: validation.sequences: {report.validation.sequences}: expected at least 1")
    return report.validation.sequences
