"""The families that are known, one file each with a value `FAMILY`; a file here is found by itself. Free of torch."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module

from counterweight.workers.errors import UnsupportedModelError
from counterweight.workers.models.family import ModelFamily

__all__ = ["families", "family_of", "is_known"]


@cache
def families() -> Mapping[str, ModelFamily]:
    """model_type -> family. ValueError for a model_type that two files claim."""
    found: dict[str, ModelFamily] = {}
    for module in pkgutil.iter_modules(__path__):
        family: ModelFamily = import_module(f"{__name__}.{module.name}").FAMILY
        for model_type in family.model_types:
            if model_type in found:
                raise ValueError(f"{module.name}: model_type {model_type}: expected one that no other family has")
            found[model_type] = family
    return found


def is_known(model_type: object) -> bool:
    """Whether a `model_type` has a family."""
    return isinstance(model_type, str) and model_type in families()


def family_of(model_type: object) -> ModelFamily:
    """The family of a `model_type`; UnsupportedModelError, listing the known ones, when there is none."""
    if isinstance(model_type, str) and (family := families().get(model_type)) is not None:
        return family
    known = ", ".join(sorted(families()))
    raise UnsupportedModelError(f"config.json: model_type: {model_type!r}: expected one of {known}")
