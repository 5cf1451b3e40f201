"""What commands share: how they read a path or URI and how they print facts."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer

SET_HELP = (
    "Override a field: spec.recipe.weights.bits=3; an item of a list: spec.recipe.keep.0=lm_head; a further one: "
    "spec.recipe.keep.+='*.q_proj'. Repeatable."
)


def absolute(uri: str) -> str:
    """A path or URI given on the command line; paths are relative to the working directory. RequestError."""
    from counterweight.pipeline.manifest import from_here

    return from_here(uri)


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A title, and a line with label and value for each row."""
    width = max(len(name) for name, _ in rows)
    typer.echo(title)
    for name, value in rows:
        typer.echo(f"  {name.ljust(width)}  {value}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of equal length, the first one of headings, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(value: object) -> None:
    """Facts for programs."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True))
