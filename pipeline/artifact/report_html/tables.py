"""Tables, lists of facts and legends of the report's page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from counterweight.pipeline.artifact.report_html.markup import Markup, elements, join, tag
from counterweight.pipeline.artifact.report_html.svg import swatch

Row = Sequence[str]


def table(head: Row, rows: Iterable[Row], *, class_: str = "n", row_classes: Sequence[str | None] = ()) -> Markup:
    """A table in a box that scrolls sideways on a narrow screen. The first column names the rows."""
    body: list[str] = []
    for index, row in enumerate(rows):
        name, *cells = row
        marks = row_classes[index] if index < len(row_classes) else None
        body.append(tag("tr", tag("th", name, scope="row"), elements("td", cells), class_=marks))
    header = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    return tag("div", tag("table", tag("thead", header), tag("tbody", *body), class_=class_), class_="scroll")


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Labels and values."""
    return tag("dl", *(join([tag("dt", label), tag("dd", value)]) for label, value in pairs), class_="facts")


def legend(entries: Iterable[tuple[str, str]], *, shapes: Sequence[str] = ()) -> Markup:
    """(class, label) of each mark; shapes: of each sample, `square` where there are fewer."""
    items = []
    for index, (class_, label) in enumerate(entries):
        shape = shapes[index] if index < len(shapes) else "square"
        drawn = f"{class_} {shape}" if shape in ("ring", "dot") else class_
        items.append(tag("li", swatch(drawn, shape=shape), tag("span", label)))
    return tag("ul", *items, class_="legend")


def figure(title: str, *content: str, caption: str = "") -> Markup:
    """A plot with its title above and what must be known to read it below."""
    below = [tag("figcaption", caption)] if caption else []
    return tag("figure", tag("h3", title), *content, *below)


def section(title: str, *content: str) -> Markup:
    """A part of the page."""
    return tag("section", tag("h2", title), *content)


def fold(summary: str, *content: str) -> Markup:
    """Content that opens on demand, without a script."""
    return tag("details", tag("summary", summary), *content)


def code(text: str) -> Markup:
    """A name or a digest."""
    return tag("code", text)
