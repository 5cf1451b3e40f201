"""What the compressed model costs to store, and what it cost to make: time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from counterweight.pipeline.artifact.report import Report, TaskReport
from counterweight.pipeline.artifact.report_html.markup import Markup, join, tag
from counterweight.pipeline.artifact.report_html.plots import Layer, TaskColumns, bits_plot
from counterweight.pipeline.artifact.report_html.tables import figure, legend, section, table
from counterweight.pipeline.artifact.report_html.text import NONE, count, exact, percent
from counterweight.pipeline.units import bytes_text, seconds_text

PHASES = ("load", "forward", "solve", "write")

PARTS = (
    ("weights", "weights", "codes"),
    ("scales", "scales", "with zero points"),
    ("factors", "factors", "low-rank branches"),
    ("residual", "residual", "CPU residual store"),
)
"""Field of the report, class of its colour, what it holds."""

TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
BYTE_UNITS = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"))

STAGES = ("tokens", "inventory", "blocks", "assemble", "validate", "publish")
"""A job's stages in order; a mapping's order is no part of a report."""


def bits_section(report: Report) -> Markup:
    """Bits per weight, all in, and what they consist of."""
    bits = report.bits_per_weight
    parts = [(name, class_, float(getattr(bits, name))) for name, class_, _ in PARTS]
    rows: list[Sequence[str]] = [
        (
            join([tag("span", name), tag("span", f", {holds}", class_="soft")]),
            exact(value, ".4f"),
            percent(value / bits.total) if bits.total > 0 else NONE,
        )
        for (name, _, holds), (_, _, value) in zip(PARTS, parts, strict=True)
    ]
    rows.append(("total, all in", exact(bits.total, ".4f"), ""))
    rows.append(("whole model", exact(bits.model, ".4f"), ""))
    return section(
        "Bits per weight",
        tag(
            "div",
            table(["", "bits per weight", "share"], rows, row_classes=[None] * len(PARTS) + ["total", None]),
            figure(
                "What a weight costs",
                legend((class_, name) for name, class_, value in parts if value > 0),
                bits_plot(bits, parts),
                caption="Parts and total are per quantized weight. Whole model: everything the artifact stores, over "
                "all of the model's weights, with embeddings, norms and the head as they were kept.",
            ),
            class_="pair",
        ),
    )


def task_section(report: Report) -> Markup:
    """Seconds and peak memory of every task, and wall time of every stage."""
    tasks = report.tasks
    parts: list[str] = [tag("p", " ".join(_totals(tasks))) if tasks else tag("p", "No task is on record.")]
    if tasks:
        parts.append(tag("div", _time(tasks), _memory(tasks), class_="pair"))
    if report.stages:
        order = sorted(report.stages, key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))
        total = sum(report.stages.values())
        rows = [
            (name, exact(report.stages[name], ".2f"), percent(report.stages[name] / total) if total > 0 else NONE)
            for name in order
        ]
        rows.append(("total", exact(total, ".2f"), ""))
        parts.append(tag("h3", "Wall time of the job, by stage"))
        stages = table(["stage", "seconds", "share"], rows, row_classes=[None] * len(order) + ["total"])
        parts.append(tag("div", stages, class_="narrow"))
    return section("Time and memory", *parts)


def _totals(tasks: Sequence[TaskReport]) -> Iterable[str]:
    own = [task for task in tasks if not task.reused]
    if own:
        yield f"{count(len(own), 'task')} took {seconds_text(sum(task.timing.total for task in own))} in sum."
    if reused := len(tasks) - len(own):
        yield (
            f"{count(reused, 'task was', 'tasks were')} found finished and reused (pale in the plots): their figures "
            "are those of the run that did the work."
        )
    host = max(tasks, key=lambda task: task.timing.host_peak_bytes)
    yield f"Largest peak on a host: {bytes_text(host.timing.host_peak_bytes)} ({host.name})."
    device = max(tasks, key=lambda task: task.timing.device_peak_bytes)
    if device.timing.device_peak_bytes:
        yield f"On a GPU: {bytes_text(device.timing.device_peak_bytes)} ({device.name})."


def _time(tasks: Sequence[TaskReport]) -> Markup:
    scale, unit = _unit(max(task.timing.total for task in tasks), TIME_UNITS)
    layers = [
        Layer(phase, phase, tuple(float(getattr(task.timing, phase)) / scale for task in tasks)) for phase in PHASES
    ]
    return figure(
        "Time per task",
        legend((phase, phase) for phase in PHASES),
        TaskColumns(tasks, "Time per task", unit).draw(layers, stacked=True),
    )


def _memory(tasks: Sequence[TaskReport]) -> Markup:
    kinds = [("host", "host", [task.timing.host_peak_bytes for task in tasks])]
    if any(task.timing.device_peak_bytes for task in tasks):
        kinds.append(("GPU", "device", [task.timing.device_peak_bytes for task in tasks]))
    scale, unit = _unit(max(max(sizes) for _, _, sizes in kinds), BYTE_UNITS)
    layers = [Layer(label, class_, tuple(size / scale for size in sizes)) for label, class_, sizes in kinds]
    return figure(
        "Peak memory per task",
        legend((class_, label) for label, class_, _ in kinds),
        TaskColumns(tasks, "Peak memory per task", unit).draw(layers, stacked=False),
    )


def _unit(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which there is more than one and a half; the last when there is none."""
    return next((unit for unit in units if largest >= 1.5 * unit[0]), units[-1])


def task_table(tasks: Sequence[TaskReport]) -> Markup:
    """Every task in figures."""
    head = ["task", *PHASES, "seconds", "host peak", "GPU peak", "device", "reused"]
    rows = [
        (
            task.name,
            *(f"{getattr(task.timing, phase):.3f}" for phase in PHASES),
            f"{task.timing.total:.3f}",
            bytes_text(task.timing.host_peak_bytes),
            bytes_text(task.timing.device_peak_bytes) if task.timing.device_peak_bytes else NONE,
            task.timing.device,
            "yes" if task.reused else "no",
        )
        for task in tasks
    ]
    return table(head, rows)
