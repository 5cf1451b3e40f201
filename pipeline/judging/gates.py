"""The bounds that a compressed model must keep before it is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.artifact import Artifact
from counterweight.pipeline.artifact.report import Report, TextReport
from counterweight.pipeline.artifact.report_html import render
from counterweight.pipeline.artifact.verdict import GateReport, GenerationReport
from counterweight.pipeline.judging.paired import bootstrap
from counterweight.pipeline.manifest import TEXT, Validation
from counterweight.pipeline.manifest.validation import Bound
from counterweight.workers.errors import GateError, RequestError
from counterweight.workers.metrics import BOUNDED, METRICS, Measure, longest_common
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, PREFILL
from counterweight.workers.workspace import WORK

GUESSING = 0.5
"""A model that knows nothing has the size of its vocabulary as its perplexity; from this share of it on it is called broken."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """What a metric may be. kind: what is held against `bound`: the metric itself, its `ratio` to `other`, or the `drop` behind
    it. other, whose: the value that it is compared with, and whose that is. windows: likewise, its number for each window.
    significance: at which the difference has to be found; None where any counts."""

    kind: str
    bound: float
    other: float = 1.0
    whose: str = "original"
    windows: Sequence[float] = ()
    significance: float | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """One measure of one model. text, variant: where. value: what was measured; windows: of each window."""

    measure: Measure
    text: str
    variant: str
    value: float
    windows: Sequence[float] = ()


def judge(
    validation: Validation,
    texts: Mapping[str, TextReport],
    rivals: Mapping[str, Report] | None = None,
    generation: GenerationReport | None = None,
) -> tuple[GateReport, ...]:
    """Every bound of the manifest, kept or not. texts: name -> what was measured on it. rivals: URI of an artifact that this
    one may not be worse than -> its report (`rivals.read_rivals`). generation: samples, where they were asked for."""
    bounds = _of_bounds(validation.bounds, texts, rivals or {}, generation)
    return (*_of_gates(validation, texts[TEXT]), *bounds)


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
            original, found = text.baseline.of(metric), _found(metric, TEXT, variant, text)
            if bound is not None and original is not None and found is not None:
                limit = _Limit("ratio" if metric.relative else "itself", bound, original)
                yield _held(f"spec.validation.{field}.{metric.gate}", found, limit)


def _of_bounds(
    bounds: Sequence[Bound],
    texts: Mapping[str, TextReport],
    rivals: Mapping[str, Report],
    generation: GenerationReport | None,
) -> Iterator[GateReport]:
    by_name = {measure.name: measure for measure in BOUNDED}
    for index, bound in enumerate(bounds):
        measure, text = by_name[bound.metric], texts[bound.text]
        found = _found(measure, bound.text, bound.variant, text, generation)
        limit = _limit(bound, measure, text, rivals, generation)
        if found is not None and limit is not None:
            yield _held(f"spec.validation.bounds.{index}.{bound.kind}", found, limit)


def _found(
    measure: Measure, name: str, variant: str, text: TextReport, generation: GenerationReport | None = None
) -> _Found | None:
    """None where the model does not have the measure."""
    if measure is longest_common.MEASURE:
        if generation is None:
            return None
        return _Found(
            measure, name, variant, generation.longest_common.get(variant, generation.longest_common[COMPENSATED])
        )
    # Without residual stores prefill and decoding are one model.
    variant = variant if variant in text.qualities else COMPENSATED
    value = text.qualities[variant].of(measure)
    return None if value is None else _Found(measure, name, variant, value, _windows(text, variant, measure))


def _windows(text: TextReport, variant: str, measure: Measure) -> Sequence[float]:
    return text.windows.get(variant, {}).get(measure.name, ())


def _limit(
    bound: Bound,
    measure: Measure,
    text: TextReport,
    rivals: Mapping[str, Report],
    generation: GenerationReport | None,
) -> _Limit | None:
    """None where there is nothing to compare with."""
    if bound.no_worse_than is not None:
        report = rivals[bound.no_worse_than]
        rival = same_text(report, text.tokens.digest)
        other = None if rival is None else _found(measure, bound.text, COMPENSATED, rival, report.generation)
        kind, allowed, whose = "drop", bound.slack, bound.no_worse_than
    else:
        other = _found(measure, bound.text, BASELINE, text, generation)
        kind = {"max_ratio": "ratio", "max_drop": "drop"}.get(bound.kind, "itself")
        allowed, whose = getattr(bound, bound.kind), "original"
    return None if other is None else _Limit(kind, allowed, other.value, whose, other.windows, bound.significance)


def same_text(report: Report, digest: str) -> TextReport | None:
    """What a report has of the text with these tokens, whatever it is called there; None for a text that it does not have."""
    return next((text for text in report.judged.values() if text.tokens.digest == digest), None)


def _held(field: str, found: _Found, limit: _Limit) -> GateReport:
    """The bound beside what was measured."""
    measure = found.measure
    least = limit.kind == "itself" and measure.higher_is_better
    measured, said = found.value, f"{found.value:{measure.digits}}"
    compared = f"{measure.short} {said}, {limit.whose} {limit.other:{measure.digits}}"
    chance = None if limit.significance is None else _chance(found, limit)
    if chance is not None:
        compared = f"{compared}, p {chance:.3g}"
    if limit.kind == "ratio":
        measured = found.value / limit.other
        said = f"{measured:.4f} ({compared})"
    elif limit.kind == "drop":
        measured = limit.other - found.value if measure.higher_is_better else found.value - limit.other
        said = f"{measured:{measure.digits}} worse ({compared})"
    if found.text != TEXT:
        said = f"{said} on {found.text!r}"
    kept = measured >= limit.bound if least else measured <= limit.bound
    chanced = chance is not None and limit.significance is not None and chance >= limit.significance
    tested = "" if limit.significance is None else f", at a significance of {limit.significance:g}"
    return GateReport(
        field=field,
        text=found.text,
        variant=found.variant,
        metric=measure.name,
        measured=measured,
        limit=limit.bound,
        least=least,
        passed=kept or chanced,
        said=f"{said}: expected at {'least' if least else 'most'} {limit.bound:g}{tested}",
    )


def _chance(found: _Found, limit: _Limit) -> float:
    """How likely windows that both do equally well on differ as much. RequestError where there are no numbers of both."""
    if not found.windows or len(found.windows) != len(limit.windows):
        raise RequestError(
            f"{limit.whose}: no number of {found.measure.name} for each window: expected no significance"
        )
    sign = -1.0 if found.measure.higher_is_better else 1.0
    return bootstrap([sign * (own - other) for own, other in zip(found.windows, limit.windows, strict=True)])
