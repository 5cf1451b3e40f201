"""HTML and SVG as values: every string that is not `Markup` is escaped, so a hostile name cannot become a tag."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

LEAVES = frozenset(("meta", "link", "circle", "line", "path", "polygon", "polyline", "rect"))
"""Elements that are written `<name/>` when they have no children: HTML's void ones, and SVG's shapes."""

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What cannot be shown or would deceive: control characters, lone surrogates, changes of direction."""

_PLAIN = re.compile(r"[\w .,:+*/()=-]*", re.ASCII)
"""What stands for itself: most of the cells of a table with a hundred thousand of them."""

Attribute = str | int | float | None


class Markup(str):
    """Text that is HTML already. `tag` and `join` make it; nothing else should."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """`text` as it may stand between tags and in attributes; hidden characters become U+FFFD."""
    return Markup(text if _PLAIN.fullmatch(text) else html.escape(_HIDDEN.sub("\ufffd", text), quote=True))


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """An element. Children that are not `Markup` are escaped.

    Attribute names: `class_` stands for class, `data_value` for data-value; those that are None are left out. Numbers
    in attributes are rounded to hundredths, which is finer than a screen.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = number(value) if isinstance(value, int | float) else value
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    if not children and name in LEAVES:
        return Markup("".join([*parts, "/>"]))
    return Markup("".join([*parts, ">", join(children), f"</{name}>"]))


def elements(name: str, contents: Iterable[str]) -> Markup:
    """One element around each of the contents, without attributes."""
    opened, closed = f"<{name}>", f"</{name}>"
    return Markup("".join(f"{opened}{part if type(part) is Markup else escape(part)}{closed}" for part in contents))


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other, escaped where they are not `Markup`."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def number(value: float) -> str:
    """The shortest text of a number rounded to hundredths."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
