"""JSON Schemas of what Counterweight reads and writes: manifests, and the documents of an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from pydantic import BaseModel

from counterweight.pipeline.manifest import schema_text
from counterweight.pipeline.manifest.schema import DIALECT, tidied
from counterweight.workers.errors import RequestError


def schema_of(kind: str) -> str:
    """A kind's JSON Schema (draft 2020-12) as text; RequestError for an unknown kind."""
    if kind not in KINDS:
        raise RequestError(f"--kind {kind[:50]!r}: expected {', '.join(KINDS)}")
    return KINDS[kind]()


def _artifact() -> str:
    from counterweight.pipeline.artifact.document import ArtifactDocument

    return _text(ArtifactDocument)


def _ledger() -> str:
    from counterweight.workers.ledger import Ledger

    return _text(Ledger)


def _report() -> str:
    from counterweight.pipeline.artifact.report import Report

    return _text(Report)


def _text(document: type[BaseModel]) -> str:
    # As it is written: a field that has a default is there too, and later versions may add fields.
    schema = tidied({"$schema": DIALECT, **document.model_json_schema(mode="serialization")})
    return json.dumps(schema, indent=2) + "\n"


KINDS: Mapping[str, Callable[[], str]] = {
    "manifest": schema_text,
    "artifact": _artifact,
    "ledger": _ledger,
    "report": _report,
}
"""Kind -> its schema. Documents are imported when asked for: those of an artifact take torch."""
