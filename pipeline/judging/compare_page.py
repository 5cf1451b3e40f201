"""A comparison as one page that needs nothing beside itself, in the style of an artifact's report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from counterweight.pipeline.artifact.report import Quality
from counterweight.pipeline.artifact.report_html.markup import Markup, tag
from counterweight.pipeline.artifact.report_html.page import document
from counterweight.pipeline.artifact.report_html.tables import section, table
from counterweight.pipeline.artifact.report_html.text import NONE, exact
from counterweight.pipeline.jobs.batch_page import tradeoff
from counterweight.pipeline.jobs.pareto import Point, front
from counterweight.pipeline.judging.compare import Row
from counterweight.pipeline.units import bytes_text
from counterweight.workers.errors import RequestError
from counterweight.workers.metrics import METRICS

HEAD = ("model", "kind", "size", "bits per weight")


def shown_metrics(rows: Sequence[Row], text: str) -> list[str]:
    """Names of the metrics that a model has on a text."""
    return [metric.name for metric in METRICS if any(row.texts[text].of(metric) is not None for row in rows)]


def table_rows(rows: Sequence[Row], text: str) -> list[tuple[str, ...]]:
    """Headings, then a line for each model."""
    metrics = [metric for metric in METRICS if metric.name in shown_metrics(rows, text)]
    lines = [(*HEAD, *(metric.short for metric in metrics))]
    for row in rows:
        values = [(metric, row.texts[text].of(metric)) for metric in metrics]
        cells = ["" if value is None else f"{value:{metric.digits}}" for metric, value in values]
        lines.append((row.name, row.kind, bytes_text(row.bytes), f"{row.bits:.3f}", *cells))
    return lines


def render_comparison(rows: Sequence[Row]) -> str:
    """The page: UTF-8 text, the same for equal rows. Every string is escaped."""
    main = tag(
        "main",
        tag("header", tag("p", "Counterweight comparison", class_="eyebrow"), tag("h1", f"{len(rows) - 1} models")),
        *(_text(rows, name) for name in rows[0].texts),
    )
    return document("Counterweight comparison", main)


def _text(rows: Sequence[Row], name: str) -> Markup:
    head, *_ = table_rows(rows, name)
    metrics = [metric for metric in METRICS if metric.name in shown_metrics(rows, name)]
    cells = [
        (
            row.name,
            row.kind,
            bytes_text(row.bytes),
            exact(row.bits, ".3f"),
            *(
                NONE if (value := row.texts[name].of(metric)) is None else exact(value, metric.digits)
                for metric in metrics
            ),
        )
        for row in rows
    ]
    # The original has more bits than all and is no one's rival.
    points = [_point(index, row, row.texts[name]) for index, row in enumerate(rows) if index]
    best = front(points, lambda point: point.perplexity)
    return section(
        f"On {name}", table(head, cells), tradeoff(points, "Perplexity", best, lambda point: point.perplexity)
    )


def _point(index: int, row: Row, quality: Quality) -> Point:
    return Point(str(index), row.name, row.kind, {}, row.uri, row.bits, quality.perplexity, quality.kl)


def write_comparison(rows: Sequence[Row], folder: Path) -> None:
    """compare.json and compare.html in a folder of this machine. RequestError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.json").write_text(json.dumps([row.facts() for row in rows], indent=1, sort_keys=True) + "\n")
        (folder / "compare.html").write_text(render_comparison(rows))
    except OSError as error:
        raise RequestError(f"--output {folder}: {error.strerror or error}") from error
