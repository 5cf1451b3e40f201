"""Finished blocks to an artifact: every block's blob is already a checkpoint shard, so assembly is copying and naming.

The order of writes is the safety: files first, then the report, then artifact.json (created once), then latest.json.
Files whose bytes follow from the artifact's id are written unconditionally; the report holds times and is created once,
and whoever finds one there takes it over, so two writers of one artifact never mix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from counterweight.pipeline.artifact import (
    CONFIG,
    DOCUMENT,
    INDEX,
    LATEST,
    REPORT,
    REPORT_PAGE,
    Artifact,
    ArtifactDocument,
    FileEntry,
    LedgerSummary,
    Published,
)
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.report import Report
from counterweight.pipeline.report_html import render
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import artifact_config
from counterweight.workers.interchange.peft import adapter_config
from counterweight.workers.ledger import ADAPTER, ADAPTER_CONFIG, LEDGER, RESIDUAL_STORE, Ledger
from counterweight.workers.models.layout import LM_HEAD
from counterweight.workers.storage import sha256_hex
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.files import Checksum, Join
from counterweight.workers.tasks.pass_through import PassThroughRecord
from counterweight.workers.tasks.records import LedgerEntry
from counterweight.workers.workspace import Blob, Workspace

SOFTWARE = ("counterweight", "torch", "transformers", "ray", "safetensors", "pydantic")


@dataclass(frozen=True, slots=True)
class Parts:
    """What an artifact is made of. first and last: kept tensors before and behind the blocks."""

    first: PassThroughRecord
    blocks: Sequence[BlockRecord]
    last: PassThroughRecord
    dropped: Sequence[LedgerEntry]

    @property
    def ledger(self) -> Ledger:
        """The account of every source tensor and every stored one."""
        entries = [*self.first.ledger, *self.last.ledger, *self.dropped]
        formats: dict[str, ModuleFormat] = {}
        tensors = {**self.first.tensors, **self.last.tensors}
        for record in self.blocks:
            entries += record.ledger
            formats |= record.formats
            tensors |= {**record.tensors, **record.factors, **record.residuals}
        return Ledger(entries=tuple(entries), formats=formats, tensors=tensors)

    @property
    def kept_bits(self) -> int:
        """Bits of everything that was carried over unchanged."""
        inside = sum(record.kept_bits for record in self.blocks)
        return self.first.bits + self.last.bits + inside


class Assembler:
    """Writes one artifact's files."""

    def __init__(
        self, artifact: Artifact, source: ModelSource, workspace: Workspace, dispatcher: Dispatcher, parts: Parts
    ) -> None:
        self._artifact, self._source, self._workspace = artifact, source, workspace
        self._dispatcher, self._parts = dispatcher, parts
        self._files: dict[str, FileEntry] = {}

    def assemble(self) -> dict[str, FileEntry]:
        """Everything but the report and artifact.json.

        1. Every source tensor stands in the ledger exactly as often as it should: at least once, and quantized where the
           recipe said so (the block task has seen to that); anything else is an error.
        2. Shards are copied under the names that transformers expects; the index follows.
        3. Factors are joined into one adapter file, residual stores into another.
        4. Workers read what was copied and joined, and compare it with what the tasks had written.
        5. config.json and ledger.json; tokenizer files as they are.
        """
        ledger = self._parts.ledger
        self._check_account(ledger)
        self._shards()
        self._adapter(ledger)
        self._residual()
        self._check_bytes()
        linears = self._linears()
        source = dict(self._source.checkpoint.config)
        if LM_HEAD in ledger.tensors:
            source["tie_word_embeddings"] = False  # a rotated model's lm_head is not its embedding
        if (field := self._source.layout.family.prediction_layers) is not None:
            source[field] = 0  # their tensors are left out
        config = artifact_config(source, ledger.formats, linears, self._source.layout.family)
        self._write(CONFIG, _json(config))
        self._write(LEDGER, ledger.model_dump_json(indent=1).encode())
        for name in self._source.checkpoint.copyable_files():
            self._write(name, self._source.store.read(name))
        return dict(self._files)

    def _check_account(self, ledger: Ledger) -> None:
        accounted = {entry.source for entry in ledger.entries}
        checkpoint = self._source.checkpoint
        missing = sorted({*checkpoint.names, *checkpoint.scales} - accounted)
        if missing:
            raise IntegrityError(f"{len(missing)} source tensors are not accounted for: {', '.join(missing[:5])}")

    def _shards(self) -> None:
        records: list[BlockRecord | PassThroughRecord] = [self._parts.first, *self._parts.blocks, self._parts.last]
        weight_map: dict[str, str] = {}
        total = 0
        for number, record in enumerate(records, start=1):
            path = f"model-{number:05}-of-{len(records):05}.safetensors"
            self._copy(record.checkpoint, path)
            weight_map |= dict.fromkeys(record.tensors, path)
            total += record.checkpoint.size
        self._write(INDEX, _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}))

    def _adapter(self, ledger: Ledger) -> None:
        parts = [(r.adapter, tuple(r.factors)) for r in self._parts.blocks if r.adapter is not None]
        if parts:
            self._join("adapter", parts, ADAPTER)
            family = self._source.layout.family
            self._write(ADAPTER_CONFIG, _json(adapter_config(ledger.formats, self._artifact.name, family)))

    def _residual(self) -> None:
        parts = [(r.residual, tuple(r.residuals)) for r in self._parts.blocks if r.residual is not None]
        if parts:
            self._join("residual store", parts, RESIDUAL_STORE)

    def _join(self, what: str, parts: Sequence[tuple[Blob, tuple[str, ...]]], path: str) -> None:
        task = Join(workspace=self._workspace.store.uri, parts=parts, output=self._artifact.uri, path=path, what=what)
        (written,) = self._dispatcher.run_all([task])
        self._files[path] = FileEntry(size=written.size, sha256=written.sha256)

    def _check_bytes(self) -> None:
        """A finished shard may have rotted since its task was done. It is discarded then, so that the next run makes it
        anew; what differs once is read again, because a bit may have turned on the way."""
        suspects = [path for path in self._files if path.endswith(".safetensors")]
        for _ in range(2):
            tasks = [Checksum(self._artifact.uri, path) for path in suspects]
            found = self._dispatcher.run_all(tasks)
            suspects = [
                path for path, sha256 in zip(suspects, found, strict=True) if sha256 != self._files[path].sha256
            ]
        if not suspects:
            return
        for path in suspects:
            self._workspace.discard(Blob(sha256=self._files[path].sha256, size=self._files[path].size))
        raise IntegrityError(
            f"{', '.join(suspects)}: not the bytes that were written (sha256): discarded, to be made anew by the next run"
        )

    def _linears(self) -> list[str]:
        layout = self._source.layout
        return [
            layout.module_name(index, name)
            for index in range(layout.blocks)
            for group in layout.block_linears(index)
            for name in group
        ]

    def _copy(self, blob: Blob, path: str) -> None:
        self._artifact.store.copy(blob.key, self._artifact.key(path))
        self._files[path] = FileEntry(size=blob.size, sha256=blob.sha256)

    def _write(self, path: str, data: bytes) -> None:
        self._artifact.store.write(self._artifact.key(path), data)
        self._files[path] = FileEntry(size=len(data), sha256=sha256_hex(data))


def publish(artifact: Artifact, report: Report, files: Mapping[str, FileEntry], ledger: Ledger) -> Published:
    """Makes an assembled artifact visible; the report that was there first holds."""
    store = artifact.store
    text = _create_or_adopt(artifact, REPORT, report.model_dump_json(indent=1).encode())
    report = Report.model_validate_json(text)
    page = _create_or_adopt(artifact, REPORT_PAGE, render(report).encode())
    everything = dict(files)
    for path, data in ((REPORT, text), (REPORT_PAGE, page)):
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
        bits_per_weight=report.bits_per_weight,
        software=report.software,
        files=everything,
    )
    store.create(artifact.key(DOCUMENT), document.model_dump_json(indent=1).encode())
    published = artifact.published()
    if published is None:
        raise IntegrityError(f"{artifact.uri}: {DOCUMENT} was written and is gone")
    _point(artifact, published.document)
    return Published(published.uri, published.document, existing=False)


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
    artifact.store.write(f"{artifact.name}/{LATEST}", _json(pointer))


def software() -> dict[str, str]:
    """Versions of what made the artifact."""
    return {name: metadata.version(name) for name in SOFTWARE}


def now() -> str:
    """The time, for people."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def job_recipe(job: CompressionJob) -> dict[str, Any]:
    """The whole recipe, defaults written out, with how it was calibrated."""
    return job.spec.model_dump(mode="json", include={"recipe", "calibration"})


def _create_or_adopt(artifact: Artifact, path: str, data: bytes) -> bytes:
    key = artifact.key(path)
    return data if artifact.store.create(key, data) else artifact.store.read(key)


def _summary(ledger: Ledger) -> LedgerSummary:
    fates = [entry.fate for entry in ledger.entries]
    return LedgerSummary(quantized=fates.count("quantized"), kept=fates.count("kept"), dropped=fates.count("dropped"))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
