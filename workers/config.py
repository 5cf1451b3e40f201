"""The base of every typed configuration that a manifest can hold."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise
from textwrap import dedent
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Config(BaseModel):
    """Frozen, keyword-only, no unknown keys, no NaN or infinity: what the manifest says is what runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The docstrings of fields are their descriptions. They are read where a schema is asked for: pydantic's own
        `use_attribute_docstrings` parses the sources of all classes whenever they are imported, for 0.3 s."""
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for kind in cls.__mro__:
            for name, text in _docstrings(kind) if issubclass(kind, Config) else ():
                # A reference to a class that says the same of itself need not repeat it.
                if name in properties and handler.resolve_ref_schema(properties[name]).get("description") != text:
                    properties[name].setdefault("description", text)
        return schema


class Method(Config):
    """Options of a method: of a computation that decides what is stored."""

    VERSION: ClassVar[int]
    """Revision of the method's mathematics, part of the key of every task that uses it (`workers.keys.versions`). Whoever
    changes the bits that it computes raises it: what others computed stays valid."""


def _docstrings(kind: type) -> Iterator[tuple[str, str]]:
    """Fields of a class that are followed by a string, with that; none of a class that was made without source."""
    try:
        source = inspect.getsource(kind)
    except OSError:
        return
    (body,) = ast.parse(dedent(source)).body
    assert isinstance(body, ast.ClassDef)
    for field, text in pairwise(body.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                yield name, inspect.cleandoc(said)


def first_problem(error: ValidationError) -> str:
    """A document's first problem in one line; whoever wrote it chose its keys, and how many of them are wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    count = error.error_count()
    return f"{where[:100]!r}: {first['msg'][:200]}" + (f"; {count} problems in all" if count > 1 else "")
