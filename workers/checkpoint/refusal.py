"""How this package words its errors: the thing, its value, what was expected; all problems at once."""

from __future__ import annotations

from collections.abc import Sequence

from counterweight.workers.errors import CheckpointError

# A wrong model has every tensor wrong: twenty lines show the pattern, a hundred thousand hide it.
MAX_LISTED = 20

# A hostile file chooses the values that an error quotes.
_MAX_SHOWN = 80


def show(value: object) -> str:
    """`repr(value)`, cut to a length that fits in an error message."""
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def refusal(subject: str, problems: Sequence[str]) -> CheckpointError:
    """One error for all `problems` (at least one) of `subject`: the first twenty, and how many there are."""
    if len(problems) == 1:
        return CheckpointError(f"{subject}: {problems[0]}")
    lines = [f"{subject}: {len(problems)} problems", *problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"... and {len(problems) - MAX_LISTED} more")
    return CheckpointError("\n  ".join(lines))
