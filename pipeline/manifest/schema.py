"""The manifest's JSON Schema, for editors, other programs and the explanation of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from counterweight.pipeline.manifest.batch import CompressionBatch
from counterweight.pipeline.manifest.job import CompressionJob
from counterweight.workers.calibration.source import TextSource

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def job_schema() -> dict[str, object]:
    """The JSON Schema (draft 2020-12) of a `CompressionJob`; a fresh copy, the caller's to change."""
    return schema_of(CompressionJob)


def batch_schema() -> dict[str, object]:
    """Likewise, of a `CompressionBatch`."""
    return schema_of(CompressionBatch)


def schema_text() -> str:
    """The JSON Schema of all kinds of manifests, as `manifests/schema.json` holds it."""
    schema = {
        "$schema": DIALECT,
        "description": "A manifest: a job or a batch of jobs.",
        # By its kind, so that an editor explains a manifest by its own schema and not by both.
        "if": {"properties": {"kind": {"const": "CompressionBatch"}}, "required": ["kind"]},
        "then": {"$ref": "#/$defs/CompressionBatch"},
        "else": {"$ref": "#/$defs/CompressionJob"},
        "$defs": _definitions(CompressionJob, CompressionBatch),
    }
    return json.dumps(schema, indent=2) + "\n"


def schema_of(kind: type[BaseModel]) -> dict[str, object]:
    """The JSON Schema of a kind of manifest; a fresh copy. The first of a kind takes 0.2 s of a processor."""
    copy: dict[str, object] = json.loads(_text_of(kind))
    return copy


@cache
def _text_of(kind: type[BaseModel]) -> str:
    schema = {"$schema": DIALECT, **kind.model_json_schema()}
    _require_tags(schema)
    _tidy(schema)
    return json.dumps(schema, indent=2) + "\n"


def _definitions(*kinds: type[BaseModel]) -> dict[str, object]:
    """Those of several kinds, the kinds themselves included; what they share is the same."""
    found: dict[str, object] = {}
    for kind in kinds:
        schema: dict[str, Any] = schema_of(kind)
        found |= schema.pop("$defs")
        del schema["$schema"]
        found[kind.__name__] = schema
    return dict(sorted(found.items()))


def _require_tags(schema: dict[str, Any]) -> None:
    """Makes the tag of a union's branches a required key, as validation does: pydantic lists it as optional
    because it has a default, and `{uri: ...}` would then be both a text and a file of tokens.
    """
    for node in _mappings(schema):
        discriminator = node.get("discriminator")
        if discriminator is None or "oneOf" not in node:
            continue
        for reference in discriminator["mapping"].values():
            name = reference.removeprefix("#/$defs/")
            required = schema["$defs"][name].setdefault("required", [])
            if name != TextSource.__name__ and discriminator["propertyName"] not in required:
                required.insert(0, discriminator["propertyName"])


def tidied(schema: dict[str, object]) -> dict[str, object]:
    """The schema without pydantic's own titles; changed in place."""
    _tidy(schema)
    return schema


def _tidy(schema: dict[str, object]) -> None:
    """Drops the titles that pydantic makes up from field names, and the line breaks of our sources."""
    for node in _mappings(schema):
        if isinstance(node.get("title"), str):
            del node["title"]
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].split())


def _mappings(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _mappings(child)
