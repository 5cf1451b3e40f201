"""The base of every typed configuration that a manifest can hold."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Config(BaseModel):
    """Frozen, keyword-only, no unknown keys, no NaN or infinity: what the manifest says is what runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Method(Config):
    """Options of a method: of a computation that decides what is stored."""

    VERSION: ClassVar[int]
    """Revision of the method's mathematics, part of the key of every task that uses it (`workers.keys.versions`). Whoever
    changes the bits that it computes raises it: what others computed stays valid."""


def first_problem(error: ValidationError) -> str:
    """A document's first problem in one line; whoever wrote it chose its keys, and how many of them are wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    count = error.error_count()
    return f"{where[:100]!r}: {first['msg'][:200]}" + (f"; {count} problems in all" if count > 1 else "")
