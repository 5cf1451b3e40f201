"""JSON as a checkpoint may contain it: one object, each key once, finite numbers, bounded in memory."""

from __future__ import annotations

import json
import math
from typing import NoReturn

from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.errors import CheckpointError


def parse_object(data: bytes, *, file: str, max_values: int) -> dict[str, object]:
    """Parses UTF-8 JSON whose outermost value is an object.

    `max_values` bounds the number of values, and with it the memory: ten million empty lists take thirty
    megabytes of JSON and a gigabyte once parsed. Raises `CheckpointError` naming `file` for anything else:
    invalid UTF-8 or JSON, a key that occurs twice in one object, NaN or an infinity, nesting beyond the
    interpreter's limit.
    """
    # Every value but the first follows one of these bytes; those inside strings only make the bound stricter.
    values = 1 + data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > max_values:
        raise CheckpointError(f"{file}: about {values} JSON values, expected at most {max_values}")
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: JSON nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not strict JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: a JSON {type(parsed).__name__}, expected an object")
    return parsed


def check_object(data: bytes, *, file: str, max_values: int) -> None:
    """As `parse_object`, for a document that something else reads: a reader takes one of two equal keys, and another reader
    the other."""
    parse_object(data, file=file, max_values=max_values)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {show(key)} occurs twice")
            seen.add(key)
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {show(text)} is beyond float64")
    return number


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
