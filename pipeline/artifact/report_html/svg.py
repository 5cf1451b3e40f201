"""Drawing: scales from data to points, their ticks, and the frame around a plot.

Coordinates are SVG's: x to the right, y downwards. Colours are classes of the page's style sheet, so a plot follows the
reader's colour scheme.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from counterweight.pipeline.artifact.report_html.markup import Attribute, Markup, join, tag
from counterweight.pipeline.artifact.report_html.text import power_of_ten

TICK = 4.0
"""Length of a tick, and distance of its text."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A marked value of a scale."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale(ABC):
    """Values low..high to points start..end."""

    low: float
    high: float
    start: float
    end: float

    @abstractmethod
    def at(self, value: float) -> float:
        """The point of a value; values outside stay at the ends."""

    @abstractmethod
    def ticks(self) -> list[Tick]:
        """Round values to mark."""

    def _point(self, share: float) -> float:
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Linear(Scale):
    """Even steps. count: about how many ticks. whole: ticks at integers only."""

    count: int = 5
    whole: bool = False

    def at(self, value: float) -> float:
        return self._point((value - self.low) / (self.high - self.low))

    def ticks(self) -> list[Tick]:
        step = round_step((self.high - self.low) / self.count)
        if self.whole:
            step = max(1.0, step)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        decimals = max(0, -floor(log10(step) + 1e-9))
        return [Tick(index * step, f"{index * step:,.{decimals}f}") for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Logarithmic(Scale):
    """Even ratios. Values at or below zero stay at the lower end, where the caller should say so."""

    def at(self, value: float) -> float:
        if value <= 0:
            return self.start
        return self._point(log10(value / self.low) / log10(self.high / self.low))

    def ticks(self) -> list[Tick]:
        first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
        if last - first >= 2:
            step = ceil((last - first) / 6)
            return [Tick(10.0**n, power_of_ten(n)) for n in range(first, last + 1, step)]
        fine = [m * 10.0**n for n in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [Tick(v, f"{v:g}") for v in fine if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    magnitude = 10.0 ** floor(log10(least))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= least * (1 - 1e-9))


def around(values: Iterable[float], start: float, end: float) -> Logarithmic:
    """A logarithmic scale over `values` (all positive, at least one), widened to the next of 1, 2, 5 on both sides."""
    found = sorted(values)
    low, high = _next_round(found[0], down=True), _next_round(found[-1], down=False)
    return Logarithmic(low, high if high > low else low * 10, start, end)


def _next_round(value: float, *, down: bool) -> float:
    magnitude = 10.0 ** floor(log10(value))
    steps = [m * magnitude for m in (1, 2, 5, 10)]
    if down:
        return max((step for step in steps if step <= value), default=magnitude)
    return min((step for step in steps if step >= value), default=10 * magnitude)


@dataclass(frozen=True, slots=True)
class Area:
    """The rectangle of a plot in which data lies."""

    left: float
    top: float
    right: float
    bottom: float


def drawing(width: float, height: float, label: str, *children: str, class_: str = "plot") -> Markup:
    """A picture; `label` says to those who cannot see it what it shows."""
    return tag("svg", *children, class_=class_, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def words(x: float, y: float, text: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Text whose baseline is at y. anchor: which of its ends is at x (`start`, `middle`, `end`)."""
    return tag("text", text, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def rising_axis(area: Area, scale: Scale, *, unit: str = "") -> Markup:
    """The y axis: grid lines with their values to the left, and the unit above them."""
    marks: list[str] = []
    for mark in scale.ticks():
        y = scale.at(mark.value)
        marks.append(tag("line", class_="grid", x1=area.left, x2=area.right, y1=y, y2=y))
        marks.append(words(area.left - TICK, y + 4, mark.label, anchor="end"))
    if unit:
        marks.append(words(area.left, area.top - 8, unit, class_="unit"))
    return tag("g", *marks)


def level_axis(area: Area, ticks: Sequence[tuple[float, str]], *, title: str = "") -> Markup:
    """The x axis: a line with ticks at these points, and a title below it."""
    marks: list[str] = [tag("line", class_="axis", x1=area.left, x2=area.right, y1=area.bottom, y2=area.bottom)]
    for x, label in ticks:
        marks.append(tag("line", class_="axis", x1=x, x2=x, y1=area.bottom, y2=area.bottom + TICK))
        marks.append(words(x, area.bottom + TICK + 12, label, anchor="middle"))
    if title:
        marks.append(
            words((area.left + area.right) / 2, area.bottom + TICK + 27, title, anchor="middle", class_="unit")
        )
    return tag("g", *marks)


def mark(shape: str, title: str = "", /, **attributes: Attribute) -> Markup:
    """A shape that shows `title` under the pointer."""
    return tag(shape, *([tag("title", title)] if title else []), **attributes)


def swatch(class_: str, *, shape: str = "square") -> Markup:
    """A legend's sample. shape: square, dot, ring or bar, as drawn in the plot."""
    shapes = {
        "square": tag("rect", x=1, y=1, width=10, height=10, rx=2, class_=class_),
        "dot": tag("circle", cx=6, cy=6, r=4, class_=class_),
        "ring": tag("circle", cx=6, cy=6, r=3.3, stroke_width=1.6, class_=class_),
        "bar": join(
            [
                tag("rect", x=3, y=0, width=6, height=12, class_=f"{class_} range"),
                tag("rect", x=1, y=5, width=10, height=2, class_=class_),
            ]
        ),
    }
    return tag("svg", shapes[shape], class_="swatch", viewBox="0 0 12 12", aria_hidden="true")
