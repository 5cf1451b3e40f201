"""pydantic's errors as lines that a manifest's author can act on.

pydantic says where validation failed, the JSON Schema says what would have been right there. Walking the
schema along an error's location gives both the text of the expectation and the true path: pydantic's location
also names the branches of unions (`source.text.uri` for `source: {kind: text, uri: 5}`), which are no keys of
the manifest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from counterweight.pipeline.manifest.expectation import (
    ANYTHING,
    Schema,
    branches,
    expectation,
    reference_name,
    resolve,
)
from counterweight.pipeline.manifest.problems import Path, alternatives, path_text, show

# Of a value that is no mapping at all, of keys that are absent, and of keys that nobody asked for: each is a
# hint that the author meant another branch of a union.
_SHAPE_ERRORS = frozenset({"model_type", "missing", "extra_forbidden"})

# Many times what is shown, so that the branches of a union are judged whole; hostile ones have thousands.
MAX_EXPLAINED = 200

# pydantic's step for an error in a mapping's key rather than in its value.
_KEY_STEP = "[key]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """One problem of a manifest, and the path it is about."""

    path: Path
    text: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{path_text(self.path)}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Located:
    """An error of pydantic's, and where it is.

    path: in the manifest. schema: of the value there. parent: schema of the mapping or list that holds the
    value. union, branch: path and schema of the choice without a tag that the error lies in, and the branch;
    or None and "".
    """

    error: Mapping[str, Any]
    path: Path
    schema: Schema
    parent: Schema
    union: tuple[Path, Schema] | None
    branch: str


def explain(error: ValidationError, document: object, schema: Schema) -> list[Complaint]:
    """What `error` says (its first `MAX_EXPLAINED` errors), in the order of the fields.

    document: what the model refused. schema: the model's JSON Schema.
    """
    found = [_locate(each, schema) for each in error.errors(include_url=False)[:MAX_EXPLAINED]]
    unions: dict[Path, list[_Located]] = defaultdict(list)
    for each in found:
        if each.union is not None:
            unions[each.union[0]].append(each)
    complaints: list[Complaint] = []
    for each in found:
        if each.union is None:
            complaints.append(_complaint(each, schema))
        elif each is unions[each.union[0]][0]:  # told once, where its first error stands
            complaints += _union_complaints(unions[each.union[0]], each.union, document, schema)
    return complaints


def _locate(error: Mapping[str, Any], root: Schema) -> _Located:
    path: Path = ()
    union: tuple[Path, Schema] | None = None
    branch = ""
    node, parent = _look_through(root, root), ANYTHING
    for step in error["loc"]:
        if "discriminator" in node:
            reference = node["discriminator"]["mapping"].get(step)
            node = resolve({"$ref": reference}, root) if reference else ANYTHING
        elif "anyOf" in node and isinstance(step, str):
            if union is None:
                union, branch = (path, node), step
            node = _branch(node, step, root)
        elif step != _KEY_STEP:
            path, parent = (*path, step), node
            node = _look_through(_member(node, step), root)
    return _Located(error=error, path=path, schema=node, parent=parent, union=union, branch=branch)


def _look_through(node: Schema, root: Schema) -> Schema:
    """The schema behind references and behind `X or null`, which pydantic's locations do not mention."""
    node = resolve(node, root)
    choices = branches(node)
    if len(choices) == 1:
        inner = resolve(choices[0], root)
        if "properties" in inner or "discriminator" in inner or "items" in inner:
            return inner
    return node


def _branch(node: Schema, label: str, root: Schema) -> Schema:
    # A label is the name of a class, wrapped in the names of its validators where it has some.
    words = re.findall(r"\w+", label)
    for each in branches(node):
        if reference_name(each) in words:
            return resolve(each, root)
    return ANYTHING


def _member(node: Schema, step: str | int) -> Schema:
    if isinstance(step, int):
        items: Schema = node.get("items", ANYTHING)
        return items
    named: Schema | None = node.get("properties", ANYTHING).get(step)
    if named is not None:
        return named
    values: Sequence[Schema] = list(node.get("patternProperties", ANYTHING).values())
    return values[0] if values else ANYTHING


def _union_complaints(
    errors: Sequence[_Located], union: tuple[Path, Schema], document: object, root: Schema
) -> list[Complaint]:
    """The errors of the branch that was meant, or one line about the choice when that cannot be told."""
    misshapen: dict[str, int] = defaultdict(int)
    for each in errors:
        misshapen[each.branch] += each.error["type"] in _SHAPE_ERRORS
    fewest = min(misshapen.values())
    meant = [branch for branch, count in misshapen.items() if count == fewest]
    if len(meant) == 1:
        return [_complaint(each, root) for each in errors if each.branch == meant[0]]
    path, node = union
    return [Complaint(path=path, text=f"{show(_value(document, path))}: expected {expectation(node, root)}")]


def _value(document: Any, path: Path) -> object:
    for step in path:
        document = document[step]
    return document


def _complaint(located: _Located, root: Schema) -> Complaint:
    error, path, node = located.error, located.path, located.schema
    kind, value = error["type"], error["input"]
    expected = expectation(node, root) or error["msg"]
    if kind == "extra_forbidden":
        return Complaint(path=path, text=f"unknown key; {_known_keys(str(path[-1]), located.parent)}")
    if kind == "missing":
        return Complaint(path=path, text=f"missing: expected {expected}", missing=True)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = error["ctx"]["discriminator"].strip("'")
        given = show(value[tag]) if tag in value else "missing"
        names = alternatives(list(node["discriminator"]["mapping"]))
        return Complaint(path=(*path, tag), text=f"{given}: expected {names}")
    if kind == "value_error":
        # A validator of a whole model speaks about its fields; the mapping itself would only be in the way.
        given = "" if isinstance(value, dict) else f"{show(value)}: "
        return Complaint(path=path, text=f"{given}{error['ctx']['error']}")
    if error["loc"][-1:] == (_KEY_STEP,):
        patterns = list(located.parent.get("patternProperties", ANYTHING))
        return Complaint(path=path, text=f"bad key: expected one like {alternatives(patterns)}")
    return Complaint(path=path, text=f"{show(value)}: expected {expected}")


def _known_keys(key: str, parent: Schema) -> str:
    if "properties" not in parent:
        return "expected another kind of value here"
    known = list(parent["properties"])
    near = get_close_matches(key[:80], known, n=1)
    expected = f"expected {known[0]}" if len(known) == 1 else f"expected one of {', '.join(known)}"
    return f"{expected}; did you mean {near[0]}?" if near else expected
