"""What a config.json may say: told from its values alone, before transformers makes anything of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from counterweight.workers.errors import CheckpointError
from counterweight.workers.models.family import ModelFamily

MAX_COUNT = 1 << 20
"""Bound on every count (`num_labels`, `n_group`, `num_hidden_layers` of a part that is never built): transformers makes a list
of that length of some, and which ones differs between its versions."""

MAX_INTEGER = 1 << 31
"""Bound on every other whole number: a position, an id."""

MAX_LAYERS = 1024
"""More layers than any published model; a config that claims more is refused before anything is built."""

MAX_EXPERTS = 1024
"""Of one block; twice the most that a published model has. Each becomes three modules, which take half a millisecond."""

MAX_WIDTH = 1 << 20
"""Bound on every other size in a config: a hostile file must not make us build (even on the meta device) without limit."""

SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Of every family."""

MAX_DEPTH = 32
"""Objects and lists inside each other; published configs have 4."""

_COUNT = re.compile(r"(n|num|number)_.*|.*_(layers|heads|experts|groups|count)")

_LAYER = re.compile(r"(?:^|[.])layers[.]([0-9]{1,6})[.]")

_POSITIVE = re.compile(r".*theta")
_NOT_NEGATIVE = re.compile(r".*(_eps|epsilon)")


def bounds(family: ModelFamily) -> dict[str, tuple[int, int]]:
    """Field of a config of this family -> the least and the most that it may say."""
    found = dict.fromkeys((*SIZE_FIELDS, *family.sizes), (1, MAX_WIDTH)) | {"num_hidden_layers": (1, MAX_LAYERS)}
    if family.experts is not None:
        found |= dict.fromkeys((family.experts.count_key, family.experts.active_key), (1, MAX_EXPERTS))
    if family.prediction_layers is not None:
        found[family.prediction_layers] = (0, MAX_LAYERS)
    return found


def check_values(config: Mapping[str, Any]) -> None:
    """CheckpointError for a number, at any depth, that no model can have, by what kind of field it stands in; and for nesting
    beyond `MAX_DEPTH`, which transformers copies by recursion."""
    pending: list[tuple[str, str, object, int]] = [("", "", config, 0)]
    while pending:
        path, field, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(f"config.json: {path[:100]}: nested more than {MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            pending += [
                (f"{path}.{key}" if path else str(key), str(key), each, depth + 1) for key, each in value.items()
            ]
        elif isinstance(value, list):
            pending += [(path, field, each, depth + 1) for each in value]
        elif (expected := _unfit(field, value)) is not None:
            raise CheckpointError(f"config.json: {path[:100]}: {str(value)[:40]}: expected {expected}")


def _unfit(field: str, value: object) -> str | None:
    """What a value of this field should have been; None where it may be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if _POSITIVE.fullmatch(field) and not value > 0:
        return "a positive number"
    if _NOT_NEGATIVE.fullmatch(field) and not 0 <= value < 1:
        return "a number from 0 to 1"
    if isinstance(value, int):
        most = MAX_COUNT if _COUNT.fullmatch(field) else MAX_INTEGER
        return None if abs(value) <= most else f"an integer of at most {most}"
    return None


def check_layers(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """CheckpointError when a config says that a model has more layers than there are among the tensors called `names`: before
    anything of them is built. A model inside a larger one has its own config under `text_config`."""
    inside = config.get("text_config")
    for part in (config, inside if isinstance(inside, Mapping) else {}):
        claimed = part.get("num_hidden_layers")
        if not isinstance(claimed, int):
            continue
        found = {match[1] for name in names if (match := _LAYER.search(name))}
        if claimed > len(found):
            raise CheckpointError(
                f"config.json: num_hidden_layers: {claimed}: the checkpoint has tensors of {len(found)} layers"
            )


def said(error: Exception) -> str:
    """What a library says of a config, on one line, without what a terminal would obey: it repeats the config's own words."""
    return "".join(character if character.isprintable() else " " for character in str(error))[:1000].strip()
