"""artifact.json, and the names of the files that an artifact has beside those of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from counterweight.pipeline.artifact.report import BitsPerWeight, Judged, ModelReport, Quality
from counterweight.workers.config import Config

CONFIG = "config.json"
DOCUMENT = "artifact.json"
INDEX = "model.safetensors.index.json"
LATEST = "latest.json"
REPORT = "report/report.json"
REPORT_PAGE = "report/report.html"


class FileEntry(Config):
    """One object of an artifact."""

    size: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LedgerSummary(Config):
    """How many source tensors met which fate."""

    quantized: int
    kept: int
    dropped: int


class ArtifactDocument(Judged):
    """artifact.json. Qualities are the report's, see `Report`."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9-]{1,63}$")
    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    created: str
    base_model: ModelReport
    recipe: Mapping[str, object]
    ledger: LedgerSummary
    baseline: Quality | None
    quantized: Quality | None
    compensated: Quality | None
    compensated_prefill: Quality | None = None
    bits_per_weight: BitsPerWeight
    software: Mapping[str, str]
    files: Mapping[str, FileEntry]


def json_bytes(value: Mapping[str, object]) -> bytes:
    """A file of JSON, as an artifact has it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
