"""The training of the compressed model as nodes of the graph, behind the blocks and before the artifact is put together.

original 0, original 1, ... ──┐        each worker its share of the sequences, beside the blocks
compress 0, compress 1, ... ──┴──> distill ──> assemble
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from counterweight.pipeline.artifact.assemble import Parts
from counterweight.pipeline.artifact.report import DistillationReport, tokens_report
from counterweight.pipeline.blocks import Blocks
from counterweight.pipeline.graph import Node
from counterweight.pipeline.manifest.job import DistillationStage
from counterweight.pipeline.stages import Job, Outside, stored_tokens
from counterweight.pipeline.tokens import Tokens
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.distill import Distill, DistillRecord, StoredBlock
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.workspace import Blob


@dataclass(frozen=True, slots=True)
class Training:
    """The training in the graph. originals: what the original makes of the texts; texts: these."""

    node: Node[DistillRecord]
    originals: tuple[Node[HiddenRecord], ...]
    texts: Tokens
    stage: DistillationStage

    @property
    def discardable(self) -> list[Blob]:
        """Blobs that nobody needs when the model is published."""
        hidden = [blob for node in self.originals for blob in node.hidden_states]
        return [*hidden, *self.node.value.states]


def add_distillation(job: Job, blocks: Blocks, outside: Outside, tokens: Tokens) -> Training | None:
    """The nodes of the training; None where the job asks for none."""
    stage = job.job.spec.distillation
    if stage is None:
        return None
    graph, layout = job.dispatcher.graph, job.source.layout
    texts = TokenSet(torch.cat([text.ids for text in (*tokens.trained, *tokens.held_out)]))
    stored = stored_tokens(job, texts)
    originals = tuple(
        graph.add(
            partial(Original, setting=job.setting, tensors=job.digests, tokens=stored, start=start, stop=stop),
            wanted=False,
        )
        for start, stop in _ranges(texts, job.dispatcher.workers)
    )
    head = (layout.names.norm, layout.names.embedding if layout.tied else layout.names.head)

    def make() -> Distill:
        return Distill(
            setting=job.setting,
            options=stage.training,
            tensors={name: job.digests[name] for name in head},
            outside=(outside.first.value.checkpoint, outside.last.value.checkpoint),
            blocks=tuple(_stored(record) for record in blocks.records),
            tokens=stored,
            targets=tuple(blob for node in originals for blob in node.hidden_states),
            trained=sum(text.sequences for text in tokens.trained),
            held_out=tuple(text.sequences for text in tokens.held_out),
        )

    after = (*blocks.compress, outside.first, outside.last)
    return Training(graph.add(make, reads=originals, after=after), originals, tokens, stage)


def distill(job: Job, training: Training, parts: Parts) -> tuple[Parts, DistillationReport]:
    """Runs the training; the parts with what it made of the blocks, and what it found."""
    (record,) = job.dispatcher.run([training.node])
    job.log.note(_outcome(record))
    texts, stage = training.texts, training.stage
    report = DistillationReport(
        trained=tuple(tokens_report(s.source, t) for s, t in zip(stage.texts, texts.trained, strict=True)),
        held_out=tuple(tokens_report(s.source, t) for s, t in zip(stage.held_out, texts.held_out, strict=True)),
        kept=record.kept,
        divergences=record.divergences,
        losses=record.losses,
    )
    return replace(parts, blocks=[_trained(block, record) for block in parts.blocks]), report


def _ranges(texts: TokenSet, workers: int) -> list[tuple[int, int]]:
    """Whole shards of sequences, dealt out to the workers: what a sequence gives does not depend on how many there are."""
    shard = shard_sequences(texts.length)
    share = -(-texts.sequences // (shard * workers)) * shard
    return [(start, min(start + share, texts.sequences)) for start in range(0, texts.sequences, share)]


def _stored(record: BlockRecord) -> StoredBlock:
    return StoredBlock(index=record.index, checkpoint=record.checkpoint, adapter=record.adapter, formats=record.formats)


def _trained(block: BlockRecord, record: DistillRecord) -> BlockRecord:
    found = record.blocks.get(block.index)
    return block if found is None else block.model_copy(update=dict(found))


def _outcome(record: DistillRecord) -> str:
    """For people."""
    first, last = record.divergences[0], record.divergences[record.kept]
    if record.kept == 0:
        return (
            f"distillation: none of {len(record.losses)} epochs made the model better on every held-out text: it "
            "stays as it was solved"
        )
    changes = ", ".join(f"{before:.5f} to {after:.5f}" for before, after in zip(first, last, strict=True))
    return f"distillation: epoch {record.kept} of {len(record.losses)} is kept: KL on held-out texts {changes}"
