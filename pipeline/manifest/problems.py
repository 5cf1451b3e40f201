"""How a wrong manifest is described: the field's path, its value, what was expected; one line a problem.

A hostile manifest chooses the keys and values that an error quotes, so both are escaped and cut: they can
neither break the line nor flood the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from counterweight.workers.errors import ManifestError

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the manifest to a value."""

# A manifest of the wrong kind has every field wrong: twenty lines show the pattern, a thousand hide it.
MAX_LINES = 20

MAX_SHOWN = 80  # characters of a quoted key or value
MAX_NAME = 300  # characters of a file's name

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_$-]{1,64}")


def path_text(path: Path) -> str:
    """`spec.recipe.overrides.0.match`: the notation that `--set` reads; unusual keys are quoted."""
    if not path:
        return "manifest"
    return ".".join(str(step) if _is_plain(step) else cut(repr(step)) for step in path)


def source_text(name: str) -> str:
    """The name of a manifest's file, as it is where that keeps to one line of reasonable length."""
    return name if name.isprintable() and len(name) <= MAX_NAME else show(name)


def show(value: object) -> str:
    """A value as the manifest's author would recognize it, cut to a length that fits in a line."""
    return cut(_written(value))


def cut(text: str) -> str:
    """The first characters of `text`, with a mark where more follow."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def alternatives(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def problem(path: Path, text: str) -> ManifestError:
    """The error for a single problem."""
    return ManifestError(f"{path_text(path)}: {text}")


def refusal(lines: Sequence[str], unexplained: int = 0) -> ManifestError:
    """One error for all problems, in at most `MAX_LINES` lines; `unexplained` ones are only counted."""
    total = len(lines) + unexplained
    if total > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... and {total - MAX_LINES + 1} more problems"]
    return ManifestError("\n".join(lines))


def _is_plain(step: str | int) -> bool:
    return isinstance(step, int) or _PLAIN_KEY.fullmatch(step) is not None


def _written(value: object) -> str:
    # Pieces beyond the cut are not even written: a value may be most of the manifest.
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value[: MAX_SHOWN + 1])
        case list():
            return f"[{', '.join(_written(item) for item in value[:MAX_SHOWN])}]"
        case dict():
            items = list(value.items())[:MAX_SHOWN]
            return f"{{{', '.join(f'{_written(key)}: {_written(item)}' for key, item in items)}}}"
        case _:
            return repr(value)
