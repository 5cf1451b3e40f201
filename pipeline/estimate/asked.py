"""Tokens that a model reads and writes when it is asked the tasks of the lm-evaluation-harness, told from their rows.

An upper bound rather than a guess: all text of a row counts as if it were asked, and a choice as if the model read its question
for it alone. What templates make of rows only the harness knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from counterweight.workers.harness import TaskDocument

CHARACTERS = 3
"""Of a token, at least: English has 4 to 5 with vocabularies of 32,000 and more."""

CHOICES = 4
"""Of an item whose choices a template makes."""

NEW_TOKENS = 256
"""That the harness lets a model write where a task does not say."""

ASKED_SPLITS = ("test_split", "validation_split")
"""Whose rows are items, the first that a task names."""


@dataclass(frozen=True, slots=True)
class Asked:
    """read: tokens of all requests. written: tokens of answers, each after a pass over all weights for a batch."""

    read: int = 0
    written: int = 0

    def __add__(self, other: Asked) -> Asked:
        return Asked(self.read + other.read, self.written + other.written)


def asked(tasks: Iterable[TaskDocument]) -> Asked:
    """Of all items of these tasks, on one model."""
    return sum(map(_of_task, tasks), Asked())


def _of_task(task: TaskDocument) -> Asked:
    config = task.config
    split = next((str(config[name]) for name in ASKED_SPLITS if config.get(name) is not None), None)
    rows = task.rows.get(split, ()) if split is not None else ()
    if not rows:
        return Asked()
    items = rows[: task.limit]
    shots = task.num_fewshot if task.num_fewshot is not None else config.get("num_fewshot") or 0
    example = sum(map(_characters, rows)) / len(rows) / CHARACTERS
    examples = example * shots if isinstance(shots, int) else 0
    sizes = [examples + _characters(row) / CHARACTERS for row in items]
    if config.get("output_type", "generate_until") == "generate_until":
        return Asked(round(sum(sizes)), len(items) * _new_tokens(config))
    return Asked(round(sum(size * _requests(config, row) for size, row in zip(sizes, items, strict=True))))


def _requests(config: Mapping[str, JsonValue], row: Mapping[str, JsonValue]) -> int:
    """Of one item that is asked for the likelihood of answers."""
    if config.get("output_type") != "multiple_choice":
        return 1
    choices = config.get("doc_to_choice")
    found = row.get(choices) if isinstance(choices, str) else choices
    return len(found) if isinstance(found, list | dict) else CHOICES


def _new_tokens(config: Mapping[str, JsonValue]) -> int:
    settings = config.get("generation_kwargs")
    most = settings.get("max_gen_toks") if isinstance(settings, dict) else None
    return most if isinstance(most, int) else NEW_TOKENS


def _characters(value: JsonValue | Mapping[str, JsonValue]) -> int:
    """Of all text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
