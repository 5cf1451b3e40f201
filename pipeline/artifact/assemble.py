"""Finished blocks to an artifact: every block's blob is already a checkpoint shard, so assembly is copying and naming.

The order of writes is the safety: a ledger first, which keeps a prune from the folder that an earlier run left; then the
other files, then the report, then artifact.json (created once), then latest.json.
Files whose bytes follow from the artifact's id are written unconditionally; the report holds times and is created once,
and whoever finds one there takes it over, so two writers of one artifact never mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

from counterweight.pipeline.artifact.document import CONFIG, INDEX, FileEntry, json_bytes
from counterweight.pipeline.artifact.reader import Artifact
from counterweight.pipeline.artifact.shards import (
    JOINED,
    Record,
    Shard,
    add_checks,
    add_join,
    add_shards,
    begun_behind,
    shard_paths,
)
from counterweight.pipeline.blocks import BlockRecipe
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.graph import Node
from counterweight.pipeline.model_source import ModelSource
from counterweight.workers.checkpoint.beside import SideFile
from counterweight.workers.errors import IntegrityError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import artifact_config
from counterweight.workers.interchange.peft import adapter_config
from counterweight.workers.ledger import ADAPTER, ADAPTER_CONFIG, LEDGER, Ledger
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.storage import sha256_hex
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.files import Checksum
from counterweight.workers.tasks.pass_through import PassThroughRecord
from counterweight.workers.tasks.records import LedgerEntry
from counterweight.workers.workspace import Blob, Workspace

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Parts:
    """What an artifact is made of. first and last: kept tensors before and behind the blocks; beside: what a multimodal model
    has beside its text model."""

    first: PassThroughRecord
    blocks: Sequence[BlockRecord]
    last: PassThroughRecord
    dropped: Sequence[LedgerEntry]
    beside: PassThroughRecord | None = None

    @property
    def kept(self) -> tuple[PassThroughRecord, ...]:
        """Everything outside the blocks."""
        return (self.first, self.last, *([] if self.beside is None else [self.beside]))

    @property
    def records(self) -> Sequence[Record]:
        """Of the checkpoint's files, in order."""
        first, *behind = self.kept
        return [first, *self.blocks, *behind]

    def ledger(self, files: Sequence[SideFile] = ()) -> Ledger:
        """The account of every source tensor and every stored one. files: of those beside the source's weights."""
        entries = [entry for record in self.kept for entry in record.ledger] + [*self.dropped]
        formats: dict[str, ModuleFormat] = {}
        tensors = {name: sha256 for record in self.kept for name, sha256 in record.tensors.items()}
        for record in self.blocks:
            entries += record.ledger
            formats |= record.formats
            tensors |= {**record.tensors, **record.factors, **record.residuals}
        return Ledger(entries=tuple(entries), formats=formats, tensors=tensors, files=tuple(files))

    @property
    def kept_bits(self) -> int:
        """Bits of everything that was carried over unchanged."""
        return sum(record.kept_bits for record in self.blocks) + sum(record.bits for record in self.kept)


def published_config(config: Mapping[str, Any], layout: ModelLayout, *, untied: bool) -> dict[str, Any]:
    """The source's config.json, with what compressing changes but for the quantization: the `model_type` that stock loaders
    know, no layers for multi-token prediction, which are left out, and, where the lm_head is a matrix of its own (as a rotated
    model's is), not tied. Of a multimodal model these are written to its `text_config`, too."""
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if (field := layout.family.prediction_layers) is not None:
        changes[field] = 0
    if layout.family.wrapper is not None:
        changes["text_config"] = {**config["text_config"], **changes}
    return {**config, "model_type": layout.model_type, **changes}


class Assembler:
    """Writes one artifact's files."""

    def __init__(self, artifact: Artifact, source: ModelSource, workspace: Workspace, dispatcher: Dispatcher) -> None:
        self._artifact, self._source, self._workspace = artifact, source, workspace
        self._dispatcher = dispatcher
        self._files: dict[str, FileEntry] = {}
        self._shards: Mapping[str, Shard] = {}
        self._joined: dict[str, Node[Written | None]] = {}

    def begin(
        self,
        made: Sequence[Node[Record]],
        blocks: Sequence[Node[BlockRecord]],
        recipes: Sequence[BlockRecipe],
        propagate: Literal["original", "compressed"],
    ) -> None:
        """Has shards copied and checked as soon as they are finished, and what is joined begun. made: the nodes of
        `Parts.records`; blocks: those among them that are blocks; recipes, propagate: of these."""
        self._claim()
        graph, values = self._dispatcher.graph, [partial(_value, node) for node in blocks]
        stops = begun_behind(len(blocks), self._dispatcher.workers, propagate)
        for file in JOINED:
            if any(file.wanted(part) for recipe in recipes for part in recipe.values()):
                join = add_join(graph, self._workspace, self._artifact, file, values, blocks, stops)
                self._joined[file.path] = join
        self._shards = add_shards(graph, self._artifact, [partial(_value, node) for node in made], made)

    def assemble(self, parts: Parts) -> dict[str, FileEntry]:
        """Everything but the report and artifact.json.

        1. Every source tensor stands in the ledger exactly as often as it should: at least once, and quantized where the
           recipe said so (the block task has seen to that); anything else is an error.
        2. ledger.json, in which every file beside the weights stands, too.
        3. Workers have shards copied under the names that transformers expects, as far as they have not begun to, and beside
           that join factors into one adapter file, residual stores into another; the index and the adapter's config follow.
        4. Workers read what was copied and joined, and compare it with what the tasks had written.
        5. config.json; tokenizer, templates, licence and what else is carried over, as they are.
        """
        beside = self._source.checkpoint.beside()
        ledger = parts.ledger(beside)
        self._check_account(ledger)
        self._write(LEDGER, ledger.model_dump_json(indent=1).encode())
        while not self._workspace.spared(self._artifact.key(LEDGER)):
            self._write(LEDGER, ledger.model_dump_json(indent=1).encode())
        self._weights(parts)
        self._index(parts)
        self._adapter_config(ledger)
        layout = self._source.layout
        linears = [layout.stock_name(name) for name in self._linears()]
        untied = layout.names.head in ledger.tensors
        source = published_config(self._source.checkpoint.config, layout, untied=untied)
        self._write(CONFIG, json_bytes(artifact_config(source, self._stock_formats(ledger), linears, layout.family)))
        for entry in beside:
            if entry.fate == "carried":
                self._carry(entry.name)
        return dict(self._files)

    def _check_account(self, ledger: Ledger) -> None:
        accounted = {entry.source for entry in ledger.entries}
        checkpoint = self._source.checkpoint
        missing = sorted({*checkpoint.names, *checkpoint.parts} - accounted)
        if missing:
            raise IntegrityError(f"{len(missing)} source tensors are not accounted for: {', '.join(missing[:5])}")

    def _claim(self) -> None:
        """Makes the folder young with its first file, whatever an earlier run left in it: an empty ledger, or the one that is
        there, which may be another run's that is further."""
        key = self._artifact.key(LEDGER)
        while True:
            if not self._artifact.store.create(key, b"{}"):
                self._artifact.store.touch(key, timedelta(0))
            if self._workspace.spared(key):
                return

    def _weights(self, parts: Parts) -> None:
        """The files that hold tensors. What is joined comes first: one worker is longer at it than others are at a shard."""
        blocks, graph = parts.blocks, self._dispatcher.graph
        written: dict[str, Node[Written] | Node[Written | None]] = {}
        checks: dict[str, list[Node[bool]]] = {}
        for file in JOINED:
            if any(file.of(record)[0] is not None for record in blocks):
                records = [partial(_same, record) for record in blocks]
                join = self._joined.get(file.path) or add_join(graph, self._workspace, self._artifact, file, records)
                written[file.path] = join
                checks[file.path] = add_checks(graph, self._artifact, file, blocks, join)
        if not self._shards:
            self._shards = add_shards(graph, self._artifact, [partial(_same, record) for record in parts.records])
        shards = self._shards
        written |= {path: one.copy for path, one in shards.items()}
        again = [node for own in checks.values() for node in own]
        self._dispatcher.run([*written.values(), *again, *(shard.check for shard in shards.values())])
        for path, node in written.items():
            if node.value is not None:
                self._files[path] = FileEntry(size=node.value.size, sha256=node.value.sha256)
        suspects = [path for path, own in checks.items() if not all(node.value for node in own)]
        suspects += [path for path, shard in shards.items() if shard.check.value != self._files[path].sha256]
        self._check_again(suspects)

    def _index(self, parts: Parts) -> None:
        shards = dict(zip(shard_paths(len(parts.records)), parts.records, strict=True))
        weight_map = {name: path for path, record in shards.items() for name in record.tensors}
        total = sum(record.checkpoint.size for record in shards.values())
        self._write(
            INDEX, json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        )

    def _adapter_config(self, ledger: Ledger) -> None:
        if ADAPTER in self._files:
            family, formats = self._source.layout.family, self._stock_formats(ledger)
            self._write(ADAPTER_CONFIG, json_bytes(adapter_config(formats, self._artifact.name, family)))

    def _check_again(self, suspects: Sequence[str]) -> None:
        """A finished shard may have rotted since its task was done. It is discarded then, so that the next run makes it
        anew. suspects: files that differ; they are read again, because a bit may have turned on the way."""
        again = [Checksum(self._artifact.uri, path, self._files[path].size) for path in suspects]
        found = dict(zip(suspects, self._dispatcher.run_all(again), strict=True))
        suspects = [path for path, sha256 in found.items() if sha256 != self._files[path].sha256]
        if not suspects:
            return
        for path in suspects:
            self._workspace.discard(Blob(sha256=self._files[path].sha256, size=self._files[path].size))
        raise IntegrityError(
            f"{', '.join(suspects)}: not the bytes that were written (sha256): discarded, to be made anew by the next run"
        )

    def _stock_formats(self, ledger: Ledger) -> dict[str, ModuleFormat]:
        return {self._source.layout.stock_name(name): form for name, form in ledger.formats.items()}

    def _linears(self) -> list[str]:
        layout = self._source.layout
        return [
            layout.module_name(index, name)
            for index in range(layout.blocks)
            for group in layout.block_linears(index)
            for name in group
        ]

    def _write(self, path: str, data: bytes) -> None:
        self._artifact.store.write(self._artifact.key(path), data)
        self._files[path] = FileEntry(size=len(data), sha256=sha256_hex(data))

    def _carry(self, name: str) -> None:
        """A file of the source, as it is: it may be as large as its author liked."""
        with self._artifact.store.open_writer(self._artifact.key(name)) as writer:
            for piece in self._source.store.stream(name):
                writer.write(piece)
            written = writer.commit()
        self._files[name] = FileEntry(size=written.size, sha256=written.sha256)


def _value(node: Node[R]) -> R:
    return node.value


def _same(record: R) -> R:
    return record
