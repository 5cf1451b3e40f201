"""What the models are worth beyond the first text's figures: bounds, further texts, drift along a window."""

from __future__ import annotations

from counterweight.pipeline.artifact.report import Report, labelled
from counterweight.pipeline.artifact.report_html.markup import Markup, join, tag
from counterweight.pipeline.artifact.report_html.tables import code, section, table
from counterweight.pipeline.artifact.report_html.text import NONE, exact
from counterweight.pipeline.artifact.verdict import GateReport
from counterweight.workers.metrics import METRICS, kl_by_position


def judged_sections(report: Report) -> Markup:
    """Sections that have something to show."""
    return join([*_gates(report), *_texts(report), *_benchmarks(report), *_drift(report), *_samples(report)])


def _gates(report: Report) -> list[Markup]:
    problem = [] if report.base_model_problem is None else [tag("p", report.base_model_problem, class_="warning")]
    if not report.gates:
        return [section("The original", *problem)] if problem else []
    rows = [(code(gate.field), gate.text, gate.variant, _verdict(gate), gate.said) for gate in report.gates]
    return [section("Gates", *problem, table(["bound", "text", "model", "kept", "measured"], rows, class_=""))]


def _verdict(gate: GateReport) -> str:
    return "yes" if gate.passed else f"no, by {gate.beyond:.4g}"


def _texts(report: Report) -> list[Markup]:
    rows = []
    for name, text in report.texts.items():
        shown = labelled(text.qualities)
        for metric in METRICS:
            values = [quality.of(metric) for quality in shown.values()]
            if any(value is not None for value in values):
                cells = [exact(value, metric.digits) if value is not None else NONE for value in values]
                rows.append((f"{name}: {metric.label}", *cells))
    if not rows:
        return []
    return [section("Further texts", table(["", *labelled(next(iter(report.texts.values())).qualities)], rows))]


def _benchmarks(report: Report) -> list[Markup]:
    rows, head = [], []
    for name, task in report.benchmarks.items():
        shown = labelled(task.scores)
        head = list(shown)
        for metric in next(iter(shown.values())):
            rows.append(
                (f"{name}: {metric}", f"{task.items:,}", *(exact(found[metric], ".4f") for found in shown.values()))
            )
    return [section("Tasks", table(["", "items", *head], rows))] if rows else []


def _drift(report: Report) -> list[Markup]:
    """Of all texts, the models that are measured apart from the original."""
    rows = []
    head: tuple[str, ...] = ()
    for name, text in report.judged.items():
        ranges = kl_by_position.PROFILE.ranges(text.tokens.sequence_length)
        for label, found in list(labelled(text.kl_by_position).items())[1:]:
            head = tuple(str(part.start) if len(part) == 1 else f"{part.start} to {part.stop - 1}" for part in ranges)
            rows.append((f"{name}, {label}", *(exact(value, ".4g") for value in found)))
    if not rows:
        return []
    about = "Mean divergence from the original in nats, by position in a window: does the error grow with the context?"
    return [section("Drift", tag("p", about), table(["position", *head], rows))]


def _samples(report: Report) -> list[Markup]:
    """What models write after the same prompts, and for how long it is the same."""
    generation = report.generation
    if generation is None:
        return []
    means = ", ".join(f"{label} {mean:.1f}" for label, mean in list(labelled(generation.longest_common).items())[1:])
    about = (
        f"Greedy, {generation.new_tokens} tokens. Tokens in a row that are the original's, mean over samples: {means}. Small "
        "differences part two texts for good: read them, they are no measure."
    )
    parts = []
    for sample in generation.samples:
        common = labelled(sample.common)
        rows = [(f"{label} ({common[label]})", text) for label, text in labelled(sample.texts).items()]
        parts.append(table(["prompt", sample.prompt], rows, class_=""))
    return [section("Samples", tag("p", about), *parts)]
