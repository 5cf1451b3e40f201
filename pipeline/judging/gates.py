"""The bounds that a compressed model must keep before it is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.artifact import Artifact
from counterweight.pipeline.artifact.report import Report, TextReport
from counterweight.pipeline.artifact.report_html import render
from counterweight.pipeline.artifact.verdict import GateReport
from counterweight.pipeline.manifest import TEXT, Validation
from counterweight.pipeline.manifest.validation import Bound
from counterweight.workers.errors import GateError
from counterweight.workers.metrics import METRICS, Metric
from counterweight.workers.tasks.evaluate import COMPENSATED, PREFILL
from counterweight.workers.workspace import WORK

GUESSING = 0.5
"""A model that knows nothing has the size of its vocabulary as its perplexity; from this share of it on it is called broken."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """What a metric may be. kind: what is held against `bound`: the metric itself, its `ratio` to `other`, or the `drop` behind
    it. other, whose: the value that it is compared with, and whose that is."""

    kind: str
    bound: float
    other: float = 1.0
    whose: str = "original"


def judge(
    validation: Validation, texts: Mapping[str, TextReport], rivals: Mapping[str, Report] | None = None
) -> tuple[GateReport, ...]:
    """Every bound of the manifest, kept or not. texts: name -> what was measured on it. rivals: URI of an artifact that this
    one may not be worse than -> its report (`rivals.read_rivals`)."""
    return (*_of_gates(validation, texts[TEXT]), *_of_bounds(validation.bounds, texts, rivals or {}))


def check(gates: Sequence[GateReport], problem: str | None = None) -> None:
    """GateError naming every bound that is not kept. problem: what is wrong with the original itself."""
    failures = [f"{gate.field}: {gate.said}" for gate in gates if not gate.passed]
    if failures:
        raise GateError("\n".join(failures if problem is None else [*failures, problem]))


def pass_or_withhold(artifact: Artifact, report: Report) -> None:
    """Lets a good model pass; of one that fails nothing stays but its report, outside the artifact. GateError."""
    try:
        check(report.gates, report.base_model_problem)
    except GateError as error:
        store, place = artifact.store, f"{WORK}/failed/{artifact.name}-{artifact.id}"
        store.write(f"{place}/report.json", report.model_dump_json(indent=1).encode())
        store.write(f"{place}/report.html", render(report).encode())
        for info in list(store.list(artifact.key(""))):
            store.delete(info.key)
        raise GateError(f"{error}\nnothing was published; the report: {store.uri_of(place)}") from error


def base_model_problem(texts: Mapping[str, TextReport], vocabulary: int) -> str | None:
    """What is wrong with the original itself, which no compression has done; None for nothing."""
    for name, text in texts.items():
        if text.baseline.perplexity >= GUESSING * vocabulary:
            return (
                f"the original itself, before any compression, has a perplexity of {text.baseline.perplexity:.1f} on "
                f"{name!r}, with a vocabulary of {vocabulary}: hardly better than guessing: look at its weights, its tokenizer "
                "and special_tokens"
            )
    return None


def _of_gates(validation: Validation, text: TextReport) -> Iterator[GateReport]:
    for field, gates, variant in (
        ("gates", validation.gates, COMPENSATED),
        ("prefill_gates", validation.prefill_gates, PREFILL),
    ):
        for metric in METRICS:
            bound: float | None = getattr(gates, metric.gate, None)
            original = text.baseline.of(metric)
            if bound is not None and original is not None:
                limit = _Limit("ratio" if metric.relative else "itself", bound, original)
                yield from _held(f"spec.validation.{field}.{metric.gate}", metric, (TEXT, variant), text, limit)


def _of_bounds(
    bounds: Sequence[Bound], texts: Mapping[str, TextReport], rivals: Mapping[str, Report]
) -> Iterator[GateReport]:
    by_name = {metric.name: metric for metric in METRICS}
    for index, bound in enumerate(bounds):
        metric, text = by_name[bound.metric], texts[bound.text]
        limit = _limit(bound, metric, text, rivals)
        if limit is not None:
            field = f"spec.validation.bounds.{index}.{bound.kind}"
            yield from _held(field, metric, (bound.text, bound.variant), text, limit)


def _limit(bound: Bound, metric: Metric, text: TextReport, rivals: Mapping[str, Report]) -> _Limit | None:
    """None where there is nothing to compare with."""
    if bound.no_worse_than is not None:
        rival = same_text(rivals[bound.no_worse_than], text.tokens.digest)
        other = None if rival is None else rival.compensated.of(metric)
        return None if other is None else _Limit("drop", bound.slack, other, bound.no_worse_than)
    allowed: float = getattr(bound, bound.kind)
    original = text.baseline.of(metric)
    kind = {"max_ratio": "ratio", "max_drop": "drop"}.get(bound.kind, "itself")
    return None if original is None else _Limit(kind, allowed, original)


def same_text(report: Report, digest: str) -> TextReport | None:
    """What a report has of the text with these tokens, whatever it is called there; None for a text that it does not have."""
    return next((text for text in report.judged.values() if text.tokens.digest == digest), None)


def _held(field: str, metric: Metric, where: tuple[str, str], text: TextReport, limit: _Limit) -> Iterator[GateReport]:
    """The bound beside what was measured; nothing where the model does not have the metric. where: text and variant."""
    name, variant = where
    # Without residual stores both are one model.
    found = text.qualities.get(variant, text.compensated).of(metric)
    if found is None:
        return
    least = limit.kind == "itself" and metric.higher_is_better
    measured, said = found, f"{found:{metric.digits}}"
    compared = f"({metric.short} {said}, {limit.whose} {limit.other:{metric.digits}})"
    if limit.kind == "ratio":
        measured = found / limit.other
        said = f"{measured:.4f} {compared}"
    elif limit.kind == "drop":
        measured = limit.other - found if metric.higher_is_better else found - limit.other
        said = f"{measured:{metric.digits}} worse {compared}"
    if name != TEXT:
        said = f"{said} on {name!r}"
    yield GateReport(
        field=field,
        text=name,
        variant=variant if variant in text.qualities else COMPENSATED,
        metric=metric.name,
        measured=measured,
        limit=limit.bound,
        least=least,
        passed=measured >= limit.bound if least else measured <= limit.bound,
        said=f"{said}: expected at {'least' if least else 'most'} {limit.bound:g}",
    )
