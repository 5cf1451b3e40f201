"""Artifacts that a job's own may not be worse than: `no_worse_than` in the bounds of a validation."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.pipeline.artifact import REPORT, file_entry, open_artifact
from counterweight.pipeline.artifact.reader import parsed
from counterweight.pipeline.artifact.report import Report, TextReport
from counterweight.pipeline.judging.gates import same_text
from counterweight.pipeline.manifest import Validation
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.errors import RequestError
from counterweight.workers.metrics import longest_common
from counterweight.workers.tasks.evaluate import COMPENSATED


def read_report(uri: str) -> Report:
    """The report of the artifact at `uri`, its bytes checked. RequestError when there is no artifact."""
    store, document = open_artifact(uri)
    data = store.read(REPORT, sha256=file_entry(store, document, REPORT).sha256)
    return parsed(Report, store, REPORT, "a report", data)


def read_rivals(validation: Validation | None, tokens: Mapping[str, TokenSet]) -> dict[str, Report]:
    """URI -> report of each artifact that bounds name. tokens: of each text. RequestError, before anything is computed, for a
    report that is not about the same tokens in the same dtype: its figures are no measure."""
    found: dict[str, Report] = {}
    for index, bound in enumerate(() if validation is None else validation.bounds):
        uri = bound.no_worse_than
        if uri is None or validation is None:
            continue
        field = f"spec.validation.bounds.{index}.no_worse_than: {uri}"
        report = found.setdefault(uri, read_report(uri))
        text = same_text(report, tokens[bound.text].digest)
        if text is None:
            raise RequestError(
                f"{field}: its report is not about the tokens of {bound.text!r}: expected the same text, windows, "
                "sequence_length and tokenizer"
            )
        if not _has(report, text, bound.metric):
            raise RequestError(f"{field}: its report has no {bound.metric}: expected it, or a bound on another metric")
        if bound.metric == longest_common.MEASURE.name:
            _check_samples(field, report, validation)
        if bound.significance is not None and not text.windows.get(COMPENSATED, {}).get(bound.metric):
            raise RequestError(
                f"{field}: its report is older and has no {bound.metric} of each window: expected no significance"
            )
        if report.validation_dtype != validation.compute_dtype:
            raise RequestError(
                f"{field}: measured in {report.validation_dtype}: expected {validation.compute_dtype}, as "
                "spec.validation.compute_dtype has it"
            )
    return found


def _has(report: Report, text: TextReport, metric: str) -> bool:
    if metric == longest_common.MEASURE.name:
        return report.generation is not None
    return getattr(text.compensated, metric, None) is not None


def _check_samples(field: str, report: Report, validation: Validation) -> None:
    """RequestError where the other's samples are of other prompts."""
    theirs, ours = report.generation, validation.generation
    assert theirs is not None
    assert ours is not None
    said = (len(theirs.samples), theirs.prompt_tokens, theirs.new_tokens)
    wanted = (ours.prompts, ours.prompt_tokens, ours.new_tokens)
    if said != wanted:
        raise RequestError(
            f"{field}: prompts, prompt_tokens and new_tokens {said}: expected {wanted}, as spec.validation.generation has them"
        )
