"""A batch's summary as one page that needs nothing beside itself, in the style of an artifact's report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from counterweight.pipeline.artifact.report_html.markup import Markup, join, tag
from counterweight.pipeline.artifact.report_html.page import document
from counterweight.pipeline.artifact.report_html.svg import Area, Linear, drawing, level_axis, mark, rising_axis
from counterweight.pipeline.artifact.report_html.tables import code, facts, legend, section, table
from counterweight.pipeline.artifact.report_html.text import NONE, exact
from counterweight.pipeline.jobs.pareto import Point, Summary
from counterweight.workers.errors import RequestError

WIDTH, HEIGHT = 640.0, 300.0
AREA = Area(60, 24, WIDTH - 16, HEIGHT - 40)
MARGIN = 0.08
"""Of an axis, left free at both ends."""

Measure = Callable[[Point], float | None]


def render_batch(summary: Summary) -> str:
    """The page: UTF-8 text, the same for equal summaries. Every string is escaped."""
    main = tag(
        "main",
        tag(
            "header",
            tag("p", "Counterweight batch", class_="eyebrow"),
            tag("h1", summary.name),
            facts([("id", code(summary.id)), ("state", summary.state), ("original", _perplexity(summary.original))]),
        ),
        batch_sections(summary),
    )
    return document(f"{summary.name} · Counterweight batch", main)


def batch_sections(summary: Summary) -> Markup:
    """The plots and the table of jobs, for this page and that of the service."""
    return join(
        [
            tradeoff(summary.points, "Perplexity", summary.perplexity_front, lambda point: point.perplexity),
            tradeoff(summary.points, "KL divergence, nats a token", summary.kl_front, lambda point: point.kl),
            section("Jobs", _table(summary)),
        ]
    )


def _perplexity(value: float | None) -> Markup:
    return tag("span", "perplexity ", exact(value, ".3f"))


def tradeoff(points: Sequence[Point], title: str, front: Sequence[str], measure: Measure) -> Markup:
    """A section with a plot of a measure against bits per weight. front: points on the Pareto front, by their jobs."""
    known = [(point, point.bits, value) for point in points if (value := measure(point)) is not None and point.bits]
    if not known:
        return section(title, tag("p", "No job has measured it."))
    across = _scale([bits for _, bits, _ in known], AREA.left, AREA.right)
    up = _scale([value for _, _, value in known], AREA.bottom, AREA.top)
    places = {point.job: (across.at(bits), up.at(value)) for point, bits, value in known}
    line = " ".join(f"{x:g},{y:g}" for x, y in (places[job] for job in front))
    dots = [
        mark(
            "circle",
            f"{point.name}: {bits:.3f} bits per weight, {value:.4g}",
            cx=places[point.job][0],
            cy=places[point.job][1],
            r=5,
            class_="after dot" if point.job in front else "before dot",
        )
        for point, bits, value in known
    ]
    picture = drawing(
        WIDTH,
        HEIGHT,
        f"{title} against bits per weight of {len(known)} jobs, of which {len(front)} are on the Pareto front",
        rising_axis(AREA, up, unit=title),
        level_axis(AREA, [(across.at(tick.value), tick.label) for tick in across.ticks()], title="bits per weight"),
        tag("polyline", points=line, class_="axis", fill="none"),
        *dots,
    )
    samples = legend([("after", "on the Pareto front"), ("before", "dominated")], shapes=["dot", "dot"])
    wide = tag("div", picture, class_="scroll wide", tabindex=0)
    return section(f"{title} against bits per weight", samples, wide)


def _scale(values: Sequence[float], start: float, end: float) -> Linear:
    low, high = min(values), max(values)
    margin = MARGIN * ((high - low) or abs(high) or 1.0)
    return Linear(low - margin, high + margin, start, end)


def _table(summary: Summary) -> Markup:
    head = ["job", "settings", "state", "bits per weight", "perplexity", "KL", "on the front of"]
    fronts = {"perplexity": summary.perplexity_front, "KL": summary.kl_front}
    rows = [
        (
            tag("span", point.name, " ", code(point.job)),
            settings_text(point.settings) or NONE,
            point.state,
            exact(point.bits, ".3f"),
            exact(point.perplexity, ".3f"),
            exact(point.kl, ".3g"),
            ", ".join(name for name, jobs in fronts.items() if point.job in jobs) or NONE,
        )
        for point in summary.points
    ]
    return table(head, rows)


def settings_text(settings: Mapping[str, JsonValue]) -> str:
    """`rank.count 16, weights.bits 3`: the fields by their last two steps."""
    return ", ".join(f"{'.'.join(path.split('.')[-2:])} {json.dumps(value)}" for path, value in settings.items())


def write_summary(summary: Summary, folder: Path) -> None:
    """batch.json and batch.html in a folder of this machine. RequestError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "batch.json").write_text(json.dumps(summary.facts(), indent=1, sort_keys=True) + "\n")
        (folder / "batch.html").write_text(render_batch(summary))
    except OSError as error:
        raise RequestError(f"--output {folder}: {error.strerror or error}") from error
