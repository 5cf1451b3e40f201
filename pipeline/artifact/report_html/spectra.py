"""Whether the ranks of branches were ample or short: how much of what they add a few of their directions hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html.markup import Markup, tag
from counterweight.pipeline.artifact.report_html.modules import by_kind, middle
from counterweight.pipeline.artifact.report_html.svg import Area, Linear, drawing, level_axis, mark, rising_axis, words
from counterweight.pipeline.artifact.report_html.tables import section
from counterweight.pipeline.artifact.report_html.text import count, percent
from counterweight.workers.tasks.records import ModuleReport

LABELS = 6
"""Of directions below a plot at most."""


@dataclass(frozen=True, slots=True)
class Spectra:
    """The modules of one kind. shares: of each, what its best 1, 2, 4, ... and all directions hold, all of one length."""

    kind: str
    shares: tuple[tuple[float, ...], ...]

    @property
    def steps(self) -> list[tuple[float, float, float]]:
        """Smallest, median and largest share at each number of directions."""
        return [(min(column), middle(column) or 0.0, max(column)) for column in zip(*self.shares, strict=True)]


def spectra_section(report: Report) -> list[Markup]:
    """Nothing where no branch was measured on held-out tokens."""
    found = spectra(report.modules)
    if not found:
        return []
    branches = count(sum(len(one.shares) for one in found), "branch", "branches")
    about = (
        f"Share of what {branches} add to outputs that the best 1, 2, 4, … of their directions hold, on held-out tokens. The "
        "line is the median of a kind, the area reaches from its smallest to its largest. Where the line is flat before its "
        "end, a smaller rank would have done; where it still rises, a larger one would win more."
    )
    return [
        section("Spectra of branches", tag("div", *map(_panel, found), class_="panels"), tag("p", about, class_="soft"))
    ]


def spectra(modules: Sequence[ModuleReport]) -> list[Spectra]:
    """Of kinds with branches, in the order of a block's computation. A branch of fewer ranks than another of its kind holds all
    of its own at those that it lacks."""
    found: list[Spectra] = []
    for kind, own in by_kind(modules).items():
        held = [module.held_out.spectrum for module in own if module.held_out is not None and module.held_out.spectrum]
        if held:
            longest = max(map(len, held))
            found.append(Spectra(kind, tuple((*one, *[1.0] * (longest - len(one))) for one in held)))
    return found


def _panel(one: Spectra) -> Markup:
    area = Area(40, 22, 248, 140)
    steps = one.steps
    level = Linear(0.0, max(len(steps) - 1, 1), area.left, area.right)
    rising = Linear(0.0, 1.0, area.bottom, area.top, count=5)
    lower = [(level.at(place), rising.at(low)) for place, (low, _, _) in enumerate(steps)]
    upper = [(level.at(place), rising.at(high)) for place, (_, _, high) in enumerate(steps)]
    line = [(level.at(place), rising.at(middle)) for place, (_, middle, _) in enumerate(steps)]
    every = -(-len(steps) // LABELS)
    ticks = [(level.at(place), str(1 << place)) for place in range(0, len(steps) - 1, every)]
    ticks = [tick for tick in ticks if tick[0] < area.right - 16]
    names = _names(len(steps))
    said = ", ".join(f"{name} {percent(middle)}" for name, (_, middle, _) in zip(names, steps, strict=True))
    return drawing(
        260,
        172,
        f"{one.kind}: of what branches add {said}",
        words(area.left, 12, one.kind, class_="strong"),
        rising_axis(area, rising),
        level_axis(area, [*ticks, (area.right, "all")], title="directions"),
        tag("polygon", points=_points([*lower, *reversed(upper)]), class_="after range"),
        tag("polyline", points=_points(line), class_="after curve"),
        *(
            mark("circle", f"{name}: median {percent(middle)}", cx=x, cy=y, r=2.5, class_="after dot")
            for (x, y), (_, middle, _), name in zip(line, steps, names, strict=True)
        ),
    )


def _names(steps: int) -> list[str]:
    return [*(f"best {1 << place} of the directions" for place in range(steps - 1)), "all directions"]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
