"""The report's plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from counterweight.pipeline.artifact.report import BitsPerWeight, TaskReport
from counterweight.pipeline.artifact.report_html.markup import Markup, join, tag
from counterweight.pipeline.artifact.report_html.modules import ExpertTokens, Panel, Spread, middle
from counterweight.pipeline.artifact.report_html.svg import (
    Area,
    Linear,
    Logarithmic,
    around,
    drawing,
    level_axis,
    mark,
    rising_axis,
    words,
)

# -- quality ----------------------------------------------------------------------------------------------------------


def perplexity_plot(points: Sequence[tuple[str, str, float]]) -> Markup:
    """One row per model: label, class of its mark, perplexity; a dashed line goes down from the first."""
    width, row = 480.0, 30.0
    longest = max(len(label) for label, _, _ in points)
    area = Area(max(118, 7 * longest + 12), 8, width - 60, 8 + row * len(points))
    values = [value for _, _, value in points]
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    scale = Linear(low - margin, high + margin, area.left, area.right, count=4)
    first = scale.at(values[0])
    parts: list[str] = [tag("line", class_="reference", x1=first, x2=first, y1=area.top, y2=area.bottom)]
    for index, (label, class_, value) in enumerate(points):
        x, y = scale.at(value), area.top + row * (index + 0.5)
        parts.append(tag("line", class_=f"{class_} bridge", x1=first, x2=x, y1=y, y2=y))
        parts.append(words(area.left - 12, y + 4, label, anchor="end"))
        parts.append(mark("circle", f"{label}: {value!r}", cx=x, cy=y, r=5.5, class_=f"{class_} point"))
        parts.append(words(x + 11, y + 4, f"{value:.3f}", class_="strong"))
    parts.append(level_axis(area, [(scale.at(t.value), t.label) for t in scale.ticks()]))
    said = ", ".join(f"{label} {value:.4f}" for label, _, value in points)
    return drawing(width, area.bottom + 26, f"Perplexity, lower is better: {said}", *parts)


# -- storage ----------------------------------------------------------------------------------------------------------


def bits_plot(bits: BitsPerWeight, parts: Sequence[tuple[str, str, float]]) -> Markup:
    """One bar, cut into label, class and bits per weight of each part."""
    width, height = 480.0, 40.0
    area = Area(10, 6, width - 10, 6 + height)
    scale = Linear(0.0, sum(value for _, _, value in parts) or 1.0, area.left, area.right, count=6)
    drawn: list[str] = []
    start = 0.0
    for label, class_, value in parts:
        if value <= 0:
            continue
        left, right = scale.at(start), scale.at(start + value)
        start += value
        title = f"{label}: {value:.4f} bits per weight"
        drawn.append(
            mark("rect", title, x=left, y=area.top, width=right - left, height=height, class_=f"{class_} segment")
        )
        if right - left > 44:
            drawn.append(
                words((left + right) / 2, area.top + 25, f"{value:.3f}", anchor="middle", class_=f"inside on-{class_}")
            )
    drawn.append(
        level_axis(area, [(scale.at(t.value), t.label) for t in scale.ticks()], title="bits per quantized weight")
    )
    said = ", ".join(f"{label} {value:.4f}" for label, _, value in parts)
    return drawing(width, area.bottom + 38, f"Bits per weight, {bits.total:.4f} in all: {said}", *drawn)


# -- errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorPlots:
    """One small plot per kind of module, all on the same axes."""

    panels: tuple[Panel, ...]
    compensated: bool
    """Whether there is an error after compensation to be told from the one before."""

    def draw(self) -> Markup:
        """The plots of the kinds that have a measured module."""
        shown = [panel for panel in self.panels if panel.spreads]
        area = Area(40, 22, 254, 140)
        values = [value for panel in shown for value in (*panel.before, *panel.after) if value > 0]
        blocks = [spread.block for panel in shown for spread in panel.spreads]
        level = Linear(min(blocks) - 0.5, max(blocks) + 0.5, area.left, area.right, count=6, whole=True)
        # Errors of exactly zero have no place on a logarithmic axis; without any other, any axis will do.
        rising = around(values or [1e-3, 1.0], area.bottom, area.top)
        return tag("div", *(self._panel(panel, area, level, rising) for panel in shown), class_="panels")

    def _panel(self, panel: Panel, area: Area, level: Linear, rising: Logarithmic) -> Markup:
        ticks = [(level.at(t.value), t.label) for t in level.ticks()]
        step = (level.end - level.start) / (level.high - level.low)
        draw = self._bars if panel.several else self._dots
        marks = [draw(spread, level.at(spread.block), step, rising) for spread in panel.spreads]
        before, after = middle(panel.before), middle(panel.after)
        said = f"{panel.kind}: relative output error by block, median {before:.2e}"
        if self.compensated:
            said += f" before and {after:.2e} after compensation"
        return drawing(
            260,
            172,
            said,
            words(area.left, 12, panel.kind, class_="strong"),
            rising_axis(area, rising),
            level_axis(area, ticks, title="block"),
            *marks,
        )

    def _dots(self, spread: Spread, x: float, step: float, rising: Logarithmic) -> Markup:
        name, before, after = spread.names[0], spread.before[0], spread.after[0]
        radius = min(max(step * 0.3, 1.3), 4.0)
        stroke = radius * 0.4
        high, low = rising.at(before), rising.at(after)
        if not self.compensated:
            return mark("circle", f"{name}: {before:.3e}", cx=x, cy=high, r=radius, class_="before dot")
        return join(
            [
                tag("line", class_="stem", x1=x, x2=x, y1=high, y2=low),
                mark(
                    "circle",
                    f"{name}: {before:.3e} before",
                    cx=x,
                    cy=high,
                    r=radius - stroke / 2,
                    stroke_width=stroke,
                    class_="before ring",
                ),
                mark("circle", f"{name}: {after:.3e} after", cx=x, cy=low, r=radius, class_="after dot"),
            ]
        )

    def _bars(self, spread: Spread, x: float, step: float, rising: Logarithmic) -> Markup:
        width = min(max(step * 0.32, 0.8), 9.0)
        sides = [("before", spread.before, -width * 0.58), ("after", spread.after, width * 0.58)]
        if not self.compensated:
            sides = [("before", spread.before, 0.0)]
        parts: list[str] = []
        for class_, values, shift in sides:
            low, centre, high = min(values), middle(values) or 0.0, max(values)
            top, bottom = rising.at(high), rising.at(low)
            title = (
                f"block {spread.block}, {len(values)} modules {class_}: {low:.2e} to {high:.2e}, median {centre:.2e}"
            )
            left = x + shift - width / 2
            # A range of a single value still shows as a hairline.
            height = max(bottom - top, 0.6)
            parts.append(mark("rect", title, x=left, y=top, width=width, height=height, class_=f"{class_} range"))
            parts.append(
                tag(
                    "rect",
                    x=left - 1,
                    y=rising.at(centre) - 0.9,
                    width=width + 2,
                    height=1.8,
                    class_=f"{class_} median",
                )
            )
        return join(parts)


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """One part of every column: what it is called, its class, its value per task in the plot's unit."""

    label: str
    class_: str
    values: tuple[float, ...]


GAP = 0.8
"""Columns' widths between the blocks and the tasks that follow them."""


@dataclass(frozen=True, slots=True)
class TaskColumns:
    """A column per task: blocks by number, then the others under their first word."""

    tasks: Sequence[TaskReport]
    title: str
    unit: str

    def draw(self, layers: Sequence[Layer], *, stacked: bool) -> Markup:
        """stacked: parts on top of each other; otherwise side by side."""
        area = Area(46, 30, 474, 200)
        slots = self._slots()
        level = Linear(0.0, slots[-1] + 1.0, area.left, area.right)
        peaks = [
            sum(values) if stacked else max(values) for values in zip(*(layer.values for layer in layers), strict=True)
        ]
        top = max(peaks) or 1.0
        rising = Linear(0.0, top, area.bottom, area.top)
        step = level.at(1.0) - level.start
        parts = [
            self._column(index, layers, level.at(slots[index]), step, rising, stacked) for index in range(len(slots))
        ]
        ticks = self._ticks(slots, level)
        return drawing(
            480,
            236,
            f"{self.title}, largest {top:.3g} {self.unit}",
            rising_axis(area, rising, unit=self.unit),
            *parts,
            level_axis(area, ticks, title="block" if any(_block(task) is not None for task in self.tasks) else ""),
        )

    def _column(
        self, index: int, layers: Sequence[Layer], left: float, step: float, rising: Linear, stacked: bool
    ) -> Markup:
        task = self.tasks[index]
        width = min(step * 0.8, 44.0) / (1 if stacked else len(layers))
        middle_of_slot = left + step / 2
        start = middle_of_slot - width * (0.5 if stacked else len(layers) / 2)
        base = 0.0
        parts: list[str] = []
        for number, layer in enumerate(layers):
            value = layer.values[index]
            x = start if stacked else start + number * width
            y, bottom = rising.at(base + value), rising.at(base)
            base = base + value if stacked else 0.0
            if value > 0:
                title = f"{task.name}: {layer.label} {value:.3g} {self.unit}"
                parts.append(mark("rect", title, x=x, y=y, width=width, height=bottom - y, class_=layer.class_))
        return tag("g", *parts, class_="reused" if task.reused else None)

    def _slots(self) -> list[float]:
        """Where each column begins, in columns' widths; the tasks that are no blocks stand apart."""
        slots: list[float] = []
        for index, task in enumerate(self.tasks):
            apart = index > 0 and _block(task) is None and _block(self.tasks[index - 1]) is not None
            slots.append(0.0 if not slots else slots[-1] + 1.0 + (GAP if apart else 0.0))
        return slots

    def _ticks(self, slots: Sequence[float], level: Linear) -> list[tuple[float, str]]:
        ticks: list[tuple[float, str]] = []
        centres = [level.at(slot + 0.5) for slot in slots]
        numbers = [number for task in self.tasks if (number := _block(task)) is not None]
        marked = {
            round(t.value) for t in Linear(0.0, max(numbers, default=0) + 1.0, 0.0, 1.0, count=8, whole=True).ticks()
        }
        limit = level.end + 16
        runs = [(word, list(run)) for word, run in groupby(range(len(self.tasks)), key=lambda i: _group(self.tasks[i]))]
        for word, members in reversed(runs):
            if word:
                # Text is about 6.5 wide a letter; it must leave neither the picture nor room for less than a space behind it.
                half = 3.25 * len(word)
                x = min((centres[members[0]] + centres[members[-1]]) / 2, limit - 10 - half)
                limit = x - half
                ticks.append((x, word))
            else:
                ticks += [(centres[i], str(n)) for i in members if (n := _block(self.tasks[i])) in marked]
        return [(x, label) for x, label in ticks if not label.isdecimal() or x < min(limit, level.end) - 10]


def _block(task: TaskReport) -> int | None:
    word, _, rest = task.name.partition(" ")
    return int(rest) if word == "block" and rest.isascii() and rest.isdecimal() else None


def _group(task: TaskReport) -> str:
    return "" if _block(task) is not None else task.name.partition(" ")[0][:16]


# -- experts ----------------------------------------------------------------------------------------------------------

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bounds between the shades, in multiples of the mean of a block's experts."""


def shade(share: float, tokens: int) -> str:
    """The class of an expert's cell: `none` without a token, else `heat0` (few) to `heat5` (many)."""
    return "none" if tokens == 0 else f"heat{sum(share >= bound for bound in SHARES)}"


def expert_map(experts: ExpertTokens) -> Markup:
    """A cell per expert, a row per block; cells with room for it say how many tokens they stand for."""
    cell = min(max(900 // len(experts.experts), 3), 64)
    row = 26 if len(experts.blocks) <= 16 else 14
    area = Area(46, 4, 46 + cell * len(experts.experts), 4 + row * len(experts.blocks))
    roomy = cell >= 46 and row >= 20
    columns = {expert: index for index, expert in enumerate(experts.experts)}
    cells: dict[str, list[str]] = {}
    texts: list[str] = []
    for line, block in enumerate(experts.blocks):
        for expert in experts.experts:
            tokens = experts.tokens.get((block, expert))
            if tokens is None:
                continue
            class_ = shade(experts.share(block, expert), tokens)
            x, y = area.left + cell * columns[expert], area.top + row * line
            gap = 1 if cell > 5 else 0
            cells.setdefault(class_, []).append(f"M{x} {y}h{cell - gap}v{row - 1}h{gap - cell}z")
            if roomy:
                texts.append(
                    words(x + cell / 2, y + row / 2 + 4, f"{tokens:,}", anchor="middle", class_=f"on-{class_}")
                )
    shapes = [tag("path", d="".join(paths), class_=class_) for class_, paths in sorted(cells.items())]
    every = max(1, -(-18 // row))
    rows = [
        words(area.left - 6, area.top + row * (line + 0.5) + 4, str(block), anchor="end")
        for line, block in enumerate(experts.blocks)
        if line % every == 0
    ]
    stride = max(1, -(-30 // cell))
    ticks = [(area.left + cell * (i + 0.5), str(e)) for i, e in enumerate(experts.experts) if i % stride == 0]
    fewest = min(experts.tokens.values())
    label = f"Calibration tokens by expert, a row per block; the fewest are {fewest}"
    picture = drawing(
        area.right + 10,
        area.bottom + 36,
        label,
        *shapes,
        *texts,
        *rows,
        words(8, (area.top + area.bottom) / 2, "block", class_="unit upright"),
        level_axis(area, ticks, title="expert"),
    )
    return tag("div", picture, class_="scroll natural", style=f"--natural: {area.right + 10:g}px")
