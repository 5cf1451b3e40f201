"""`--set path=value`: changes to a manifest's document before it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from counterweight.pipeline.manifest.document import MAX_DEPTH, parse_yaml
from counterweight.pipeline.manifest.problems import Path, cut, path_text, show
from counterweight.workers.errors import ManifestError

FURTHER = "+"
"""Step of a path: behind the last item of a list."""

_EXPECTED = "expected path=value, such as spec.recipe.weights.bits=3"


def apply_overrides(document: object, overrides: Sequence[str]) -> list[Path]:
    """Changes `document` in place, in the order given (a later one wins), and returns the paths that were
    set.

    A path's steps are keys and list indices, joined by dots, `+` for a further item of a list (`spec.recipe.keep.+=*.q_proj`);
    missing mappings and lists on the way are created. The value is YAML: a scalar, or a list or mapping in brackets; nothing
    at all is null. Whether the manifest has such a key is for the validation to say. Raises `ManifestError` for an override
    that is malformed or that leads through a scalar, or to a list item that is not there.
    """
    return [_apply(document, override) for override in overrides]


def _apply(document: Any, override: str) -> Path:
    dotted, equals, text = override.partition("=")
    steps = dotted.strip().split(".")
    if not equals or not all(steps) or len(steps) > MAX_DEPTH:
        raise ManifestError(f"--set {show(override)}: {_EXPECTED}")
    option = f"--set {cut(dotted.strip())}"
    path: Path = ()
    holder = document
    for step, following in pairwise(steps):
        path, holder = _descend(path, holder, step, [] if following == FURTHER else {}, option)
    key = _key(path, holder, steps[-1], option)
    path = (*path, key)
    value = parse_yaml(text, name=option, path=path) if text.strip() else None
    _put(holder, key, value)
    return path


def _descend(path: Path, holder: Any, step: str, empty: object, option: str) -> tuple[Path, Any]:
    """What lies at a step; `empty` is put there where there is nothing."""
    key = _key(path, holder, step, option)
    if step == FURTHER or (isinstance(holder, dict) and holder.get(key) is None):
        _put(holder, key, empty)
    return (*path, key), holder[key]


def _put(holder: Any, key: str | int, value: object) -> None:
    if isinstance(holder, list) and key == len(holder):
        holder.append(value)
    else:
        holder[key] = value


def _key(path: Path, holder: object, step: str, option: str) -> str | int:
    """`step` as a key of `holder`, as an index of an item that it has, or as that of a further one."""
    if isinstance(holder, dict):
        return step
    if isinstance(holder, list):
        if step == FURTHER:
            return len(holder)
        if step.isascii() and step.isdigit() and len(step) < 6 and int(step) < len(holder):
            return int(step)
        raise ManifestError(
            f"{option}: {path_text(path)} is a list of {len(holder)}: {show(step)}: expected an index from 0, or +"
        )
    raise ManifestError(f"{option}: {path_text(path)} is {show(holder)}: expected a mapping or a list")
