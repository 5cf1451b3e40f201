"""The artifact: what it holds (`document`, `report`), how it is found (`reader`), checked and fetched (`transfer`), made
(`assemble`, `publish`) and loaded (`load`)."""

from __future__ import annotations

from counterweight.pipeline.artifact.document import (
    CONFIG,
    DOCUMENT,
    INDEX,
    LATEST,
    REPORT,
    REPORT_PAGE,
    ArtifactDocument,
    FileEntry,
)
from counterweight.pipeline.artifact.reader import (
    Artifact,
    Published,
    file_entry,
    open_artifact,
    read_document,
    resolve,
)
from counterweight.pipeline.artifact.transfer import pull, verify

__all__ = [
    "CONFIG",
    "DOCUMENT",
    "INDEX",
    "LATEST",
    "REPORT",
    "REPORT_PAGE",
    "Artifact",
    "ArtifactDocument",
    "FileEntry",
    "Published",
    "file_entry",
    "open_artifact",
    "pull",
    "read_document",
    "resolve",
    "verify",
]
