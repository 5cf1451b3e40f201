"""How large the model was and is, what it was before, and how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from counterweight.pipeline.artifact.making import Making, Span
from counterweight.pipeline.artifact.report import Report, labelled
from counterweight.pipeline.artifact.report_html.markup import Markup, tag
from counterweight.pipeline.artifact.report_html.svg import Area, Linear, drawing, level_axis, mark, words
from counterweight.pipeline.artifact.report_html.tables import code, facts, figure, legend, section, table
from counterweight.pipeline.artifact.report_html.text import NONE, count, percent
from counterweight.pipeline.units import bytes_text, seconds_text
from counterweight.workers.metrics import METRICS

KINDS = {
    **dict.fromkeys(("describe", "inspect", "prefetch"), "load"),
    **dict.fromkeys(("embed", "forward", "propagate", "sample", "original", "evaluate"), "forward"),
    **dict.fromkeys(("keep", "copy", "join", "checksum"), "write"),
}
"""Kind of a task -> class of its colour: what it mostly does; of any other `solve`."""

LANES = 32
"""Workers that the timeline shows."""


def size_line(report: Report) -> str | None:
    """Bytes before and after, and their ratio; None in a report that is older."""
    sizes = report.sizes
    if sizes is None or not sizes.artifact:
        return None
    ratio = f"{sizes.source / sizes.artifact:.2f} times smaller"
    return f"{bytes_text(sizes.source)} before, {bytes_text(sizes.artifact)} after: {ratio}"


def earlier_section(report: Report) -> list[Markup]:
    """This artifact beside the one of its name before it, and what differs in what was asked; nothing without one."""
    before = report.earlier
    if before is None:
        return []
    rows: list[tuple[str, ...]] = []
    for variant, label in _labels(report, before.qualities).items():
        now, was = report.qualities.get(variant), before.qualities.get(variant, {})
        for metric in METRICS:
            value = None if now is None else now.of(metric)
            old = was.get(metric.name)
            if value is not None or old is not None:
                rows.append((f"{metric.label}, {label}", *_pair(old, value, metric.digits)))
    rows.append(("bits per weight", *_pair(before.bits, report.bits_per_weight.total, ".3f")))
    changed = sorted(_differences(before.recipe, report.recipe))
    about = "Nothing differs in what was asked." if not changed else "What was asked differs in:"
    return [
        section(
            "Beside the run before",
            tag("p", "The artifact of this name before: ", code(before.id), f", of {before.created}."),
            table(["", "before", "now", "change"], rows),
            tag("p", about),
            *([tag("ul", *(tag("li", code(line)) for line in changed))] if changed else []),
        )
    ]


def _labels(report: Report, before: Iterable[str]) -> dict[str, str]:
    """Variant -> what people call it, of those that either run measured."""
    variants = dict.fromkeys((*before, *report.qualities))
    return {variant: label for label, variant in labelled({variant: variant for variant in variants}).items()}


def _pair(before: float | None, now: float | None, form: str) -> tuple[str, str, str]:
    shown = [NONE if value is None else f"{value:{form}}" for value in (before, now)]
    change = NONE if before is None or now is None else f"{now - before:+.4g}"
    return shown[0], shown[1], change


def _differences(before: object, now: object, path: str = "") -> Iterable[str]:
    """Fields of two documents that differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from _differences(before.get(name), now.get(name), f"{path}.{name}" if path else str(name))
    elif before != now:
        yield f"{path}: {before} → {now}"


def making_section(report: Report) -> list[Markup]:
    """Command, machine, and which worker did what when; nothing in a report that is older."""
    making = report.making
    if making is None:
        return []
    host = making.host
    pairs = [
        ("command", code(making.command)),
        ("driven on", f"{host.processor}, {count(host.cores, 'core')}, {bytes_text(host.memory)}, {host.system}"),
        ("Python", host.python),
        ("workers", str(making.workers)),
    ]
    if making.utilisation is not None:
        pairs.append(("utilisation", f"{percent(making.utilisation)} of the workers' {seconds_text(making.seconds)}"))
    parts: list[Markup] = [facts(pairs)]
    if making.spans:
        parts.append(_timeline(making))
    return [section("How it was made", *parts)]


def _timeline(making: Making) -> Markup:
    spans, lanes = making.spans, sorted({span.worker for span in making.spans})[:LANES]
    height = 22.0
    area = Area(70, 8, 868, 8 + height * len(lanes))
    level = Linear(0.0, max(making.seconds, 1e-3), area.left, area.right, count=10)
    parts: list[str] = []
    for row, worker in enumerate(lanes):
        top = area.top + row * height
        parts.append(words(area.left - 8, top + height / 2 + 4, f"worker {worker}", anchor="end"))
        parts += [_bar(span, level, top + 3, height - 6) for span in spans if span.worker == worker]
    ticks = [(level.at(tick.value), tick.label) for tick in level.ticks()]
    busy = [f"worker {worker} {percent(_busy(spans, worker, making.seconds))}" for worker in lanes]
    notes = ["Seconds since the first task. Busy: " + ", ".join(busy) + "."]
    hidden = len({span.worker for span in spans}) - len(lanes)
    if hidden:
        notes.append(f"{count(hidden, 'further worker')} not shown.")
    if making.left_out:
        notes.append(f"{count(making.left_out, 'later task')} not shown.")
    picture = drawing(880, area.bottom + 36, "When each worker had which task", *parts, level_axis(area, ticks))
    named = {"load": "reads", "forward": "runs the model", "solve": "solves, trains", "write": "carries over"}
    return figure(
        "Tasks by worker",
        legend(list(named.items())),
        tag("div", picture, class_="scroll natural", style="--natural: 880px"),
        caption=" ".join(notes),
    )


def _bar(span: Span, level: Linear, top: float, height: float) -> Markup:
    x, end = level.at(span.start), level.at(span.start + span.seconds)
    title = f"{span.task}: {seconds_text(span.seconds)}"
    class_ = KINDS.get(span.kind, "solve")
    return mark("rect", title, x=x, y=top, width=max(end - x, 0.6), height=height, class_=class_)


def _busy(spans: Sequence[Span], worker: int, seconds: float) -> float:
    return sum(span.seconds for span in spans if span.worker == worker) / seconds if seconds else 0.0
