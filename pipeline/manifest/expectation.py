"""What a JSON Schema asks for, in words: `an integer from 1 to 128`, `2, 3, 4 or 8`, `a mapping with uri`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from counterweight.pipeline.manifest.problems import alternatives

Schema = Mapping[str, Any]

ANYTHING: Schema = {}

_SIMPLE = {"boolean": "true or false", "null": "null", "array": "a list"}
_NUMBERS = {"integer": "an integer", "number": "a number"}
_REFERENCE = "#/$defs/"


def resolve(node: Schema, root: Schema) -> Schema:
    """`node` behind its reference into `root`; ANYTHING when there is nothing behind it."""
    while "$ref" in node:
        node = root.get("$defs", ANYTHING).get(node["$ref"].removeprefix(_REFERENCE), ANYTHING)
    return node


def reference_name(node: Schema) -> str:
    """The name of the definition that `node` refers to, or an empty string."""
    reference: str = node.get("$ref", "")
    return reference.removeprefix(_REFERENCE)


def branches(node: Schema) -> list[Schema]:
    """The alternatives of a choice without a tag, `null` left out."""
    return [each for each in node.get("anyOf", ()) if each.get("type") != "null"]


def expectation(node: Schema, root: Schema) -> str:
    """What `node` asks for; an empty string when it asks for nothing in particular."""
    node = resolve(node, root)
    if "anyOf" in node:
        return _choice(node, root)
    if "discriminator" in node:
        tag = node["discriminator"]
        return f"a mapping with {tag['propertyName']} {alternatives(list(tag['mapping']))}"
    if "enum" in node or "const" in node:
        return alternatives([_scalar(each) for each in node.get("enum", [node.get("const")])])
    kind = node.get("type")
    if kind in _NUMBERS:
        multiple = node.get("multipleOf")
        noun = _NUMBERS[kind] if multiple is None else f"a multiple of {_scalar(multiple)}"
        return f"{noun}{_bounds(node)}"
    if kind == "string":
        return _string(node)
    if kind == "object":
        return _mapping(node)
    return _SIMPLE.get(str(kind), "")


def _choice(node: Schema, root: Schema) -> str:
    each = [resolve(branch, root) for branch in branches(node)]
    required = [branch.get("required") for branch in each]
    if len(each) > 1 and all(required):
        texts = ["a mapping with " + alternatives([" and ".join(keys or ()) for keys in required])]
    else:
        texts = [expectation(branch, root) for branch in each]
    if len(each) < len(node["anyOf"]):
        texts.append("null")
    # "2, 3 or 4 or null" would leave open what belongs together.
    nested = any(" or " in text or " and " in text for text in texts)
    return ", or ".join(texts) if nested else alternatives(texts)


def _mapping(node: Schema) -> str:
    keys = node.get("required") or list(node.get("properties", ()))
    if not keys:
        return "a mapping"
    joined = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    return f"a mapping with {joined}" if node.get("required") else f"a mapping, its keys among {joined}"


def _string(node: Schema) -> str:
    # The keyword that editors know for saying in words what a pattern asks for.
    said: str | None = node.get("patternErrorMessage")
    if said is not None:
        return said
    if "pattern" in node:
        return f"a string like {node['pattern']}"
    lowest, highest = node.get("minLength"), node.get("maxLength")
    if highest is not None:
        return f"a string of {lowest or 0} to {highest} characters"
    return "a string"


def _bounds(node: Schema) -> str:
    lowest, above = node.get("minimum"), node.get("exclusiveMinimum")
    highest, below = node.get("maximum"), node.get("exclusiveMaximum")
    if node["type"] == "integer" and above is not None:
        lowest, above = above + 1, None
    if lowest is not None and highest is not None:
        return f" from {_scalar(lowest)} to {_scalar(highest)}"
    parts = [
        f"{word} {_scalar(bound)}"
        for word, bound in (("from", lowest), ("above", above), ("up to", highest), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _scalar(value: object) -> str:
    # As the manifest writes it: true, null, 128, and 1 for a bound of 1.0.
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)
