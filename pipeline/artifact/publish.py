"""An assembled artifact becomes visible: the report, then artifact.json (created once), then latest.json."""

from __future__ import annotations

import json
from collections.abc import Mapping

from counterweight.pipeline.artifact.card import CARD, card
from counterweight.pipeline.artifact.document import (
    CONFIG,
    DOCUMENT,
    LATEST,
    REPORT,
    REPORT_PAGE,
    ArtifactDocument,
    FileEntry,
    LedgerSummary,
    json_bytes,
)
from counterweight.pipeline.artifact.making import Earlier
from counterweight.pipeline.artifact.reader import Artifact, Published, parsed
from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from counterweight.workers.errors import CheckpointError, IntegrityError, ObjectNotFoundError, RequestError
from counterweight.workers.interchange.compressed_tensors import QUANT_METHOD
from counterweight.workers.ledger import Ledger
from counterweight.workers.storage import ObjectStore, sha256_hex
from counterweight.workers.storage.names import check_key


def publish(artifact: Artifact, report: Report, files: Mapping[str, FileEntry], ledger: Ledger) -> Published:
    """Makes an assembled artifact visible; the report that was there first holds."""
    store = artifact.store
    own = report.model_dump_json(indent=1).encode()
    text = _create_or_adopt(artifact, REPORT, own)
    report = report if text is own else _written(artifact, text)
    page = _create_or_adopt(artifact, REPORT_PAGE, render(report).encode())
    everything = dict(files)
    about = card(report, files, stock=_is_stock(artifact, files[CONFIG])).encode()
    store.write(artifact.key(CARD), about)
    for path, data in ((REPORT, text), (REPORT_PAGE, page), (CARD, about)):
        everything[path] = FileEntry(size=len(data), sha256=sha256_hex(data))
    document = ArtifactDocument(
        name=artifact.name,
        id=artifact.id,
        created=report.created,
        base_model=report.model,
        recipe=report.recipe,
        ledger=_summary(ledger),
        baseline=report.baseline,
        quantized=report.quantized,
        compensated=report.compensated,
        compensated_prefill=report.compensated_prefill,
        bits_per_weight=report.bits_per_weight,
        software=report.software,
        files=everything,
    )
    first = store.create(artifact.key(DOCUMENT), document.model_dump_json(indent=1).encode())
    published = artifact.published()
    if published is None:
        raise IntegrityError(f"{artifact.uri}: {DOCUMENT} was written and is gone")
    if first:
        _point(artifact, published.document)
    else:  # another driver was faster, perhaps by hours where this one was stopped: newer artifacts may be there by now
        repair_pointer(artifact, published.document)
    return Published(published.uri, published.document, existing=False)


def latest(store: ObjectStore, name: str) -> Published | None:
    """The artifact of a name that was published last; None without one, and where its pointer or document is damaged."""
    try:
        pointer = json.loads(store.read(f"{name}/{LATEST}"))
        return Artifact(store, name, check_key(str(pointer["id"]))).published()
    except (ObjectNotFoundError, IntegrityError, RequestError, ValueError, KeyError, TypeError):
        return None


def before(artifact: Artifact) -> Earlier | None:
    """The artifact of this name that was published last before this one; None for the first."""
    found = latest(artifact.store, artifact.name)
    if found is None or found.document.id == artifact.id:
        return None
    document = found.document
    return Earlier(
        id=document.id,
        created=document.created,
        bits=document.bits_per_weight.total,
        qualities={variant: quality.model_dump() for variant, quality in document.qualities.items()},
        recipe=document.recipe,
    )


def _written(artifact: Artifact, text: bytes) -> Report:
    """The report that a run of this job wrote; IntegrityError where it was damaged since."""
    key = artifact.key(REPORT)
    try:
        return parsed(Report, artifact.store, key, "a report", text)
    except CheckpointError as error:
        raise IntegrityError(f"{error}: expected the one that a run of this job wrote") from error


def _is_stock(artifact: Artifact, entry: FileEntry) -> bool:
    """Whether stock transformers reads the weights. entry: of config.json."""
    config = json.loads(artifact.store.read(artifact.key(CONFIG), sha256=entry.sha256))
    return bool(config["quantization_config"]["quant_method"] != QUANT_METHOD)


def repair_pointer(artifact: Artifact, document: ArtifactDocument) -> None:
    """Completes a publication whose driver was killed before its last write: an artifact that is newer than the one that
    latest.json names takes its place."""
    try:
        pointer = json.loads(artifact.store.read(f"{artifact.name}/{LATEST}"))
        newest = str(pointer["created"])
    except (ObjectNotFoundError, ValueError, KeyError, TypeError):
        newest = ""
    if newest < document.created:
        _point(artifact, document)


def _point(artifact: Artifact, document: ArtifactDocument) -> None:
    pointer = {"id": artifact.id, "uri": artifact.uri, "created": document.created}
    artifact.store.write(f"{artifact.name}/{LATEST}", json_bytes(pointer))


def _create_or_adopt(artifact: Artifact, path: str, data: bytes) -> bytes:
    key = artifact.key(path)
    return data if artifact.store.create(key, data) else artifact.store.read(key)


def _summary(ledger: Ledger) -> LedgerSummary:
    fates = [entry.fate for entry in ledger.entries]
    return LedgerSummary(quantized=fates.count("quantized"), kept=fates.count("kept"), dropped=fates.count("dropped"))
