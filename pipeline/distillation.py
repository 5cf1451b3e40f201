"""The training of the compressed model as nodes of the graph, behind the blocks and before the artifact is put together.

original 0, original 1, ... ──┐        each worker its share of the sequences, beside the blocks
compress 0, compress 1, ... ──┴──> replicas ──> replicas ──> ... ──> epoch ──> replicas ──> ... ──> distill ──> assemble
                                   round 1      round 2

Replicas of a round train at the same time; each begins with the mean of those before. Their number is the recipe's: with fewer
workers they wait for each other, with more some workers have nothing to do. Nodes are added round by round, because how many
epochs there are is known when training has lost its patience.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from counterweight.pipeline.artifact.assemble import Parts
from counterweight.pipeline.artifact.report import DistillationReport, TaskReport, tokens_report
from counterweight.pipeline.blocks import Blocks
from counterweight.pipeline.graph import Node
from counterweight.pipeline.manifest.job import DistillationStage
from counterweight.pipeline.stages import Job, Outside, stored_tokens
from counterweight.pipeline.tokens import Tokens
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.tasks.block import BlockRecord
from counterweight.workers.tasks.distill import Distill, DistillRecord
from counterweight.workers.tasks.epoch import Epoch, EpochRecord, epoch_key
from counterweight.workers.tasks.original import Original, OriginalRecord
from counterweight.workers.tasks.replica import Replica, ReplicaRecord
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.tasks.task import committed
from counterweight.workers.tasks.training import StoredBlock, TrainingSpec
from counterweight.workers.workspace import Blob

Kept = TypeVar("Kept", ReplicaRecord, EpochRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What is trained on and held out, in the graph. tokens: all of it as a blob; originals: what the original makes of it."""

    texts: Tokens
    stage: DistillationStage
    tokens: Blob
    originals: tuple[Node[OriginalRecord], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training made of a model. discardable: blobs that nobody needs when the model is published."""

    parts: Parts
    report: DistillationReport
    tasks: tuple[TaskReport, ...]
    discardable: tuple[Blob, ...]


def add_texts(job: Job, tokens: Tokens) -> Texts | None:
    """The nodes of what the original makes of the texts; None where the job asks for no training."""
    stage = job.job.spec.distillation
    if stage is None:
        return None
    texts = TokenSet(torch.cat([text.ids for text in (*tokens.trained, *tokens.held_out)]))
    stored = stored_tokens(job, texts)
    originals = tuple(
        job.dispatcher.graph.add(
            partial(Original, setting=job.setting, tensors=job.digests, tokens=stored, start=start, stop=stop)
        )
        for start, stop in _ranges(texts, job.dispatcher.workers)
    )
    return Texts(texts=tokens, stage=stage, tokens=stored, originals=originals)


def distill(job: Job, texts: Texts, blocks: Blocks, outside: Outside, parts: Parts) -> Trained:
    """Runs the training on blocks that are finished."""
    job.dispatcher.run(texts.originals)
    spec = _spec(job, texts, blocks, outside)
    record = committed(job.workspace, Distill.kind, spec.key(), DistillRecord)
    tasks: list[TaskReport] = []
    if record is None:
        rounds = _Rounds(job, texts, spec)
        last = rounds.to_the_end()
        node = job.dispatcher.graph.add(partial(Distill, training=spec, last=last))
        (record,) = job.dispatcher.run([node])
        tasks = [*rounds.tasks, TaskReport(name=node.made().name, reused=False, timing=record.timing)]
    job.log.note(_outcome(record))
    tokens, stage = texts.texts, texts.stage
    report = DistillationReport(
        trained=tuple(tokens_report(s.source, t) for s, t in zip(stage.texts, tokens.trained, strict=True)),
        held_out=tuple(tokens_report(s.source, t) for s, t in zip(stage.held_out, tokens.held_out, strict=True)),
        kept=record.kept,
        divergences=record.divergences,
        losses=record.losses,
    )
    hidden = (blob for node in texts.originals for blob in node.hidden_states)
    return Trained(
        parts=replace(parts, blocks=[_trained(block, record) for block in parts.blocks]),
        report=report,
        tasks=tuple(tasks),
        discardable=(*hidden, *record.states),
    )


class _Rounds:
    """Epoch after epoch of a training. tasks: that were run or found, in order."""

    def __init__(self, job: Job, texts: Texts, spec: TrainingSpec) -> None:
        self._job, self._texts, self._spec = job, texts, spec
        self._nodes: list[Node[ReplicaRecord] | Node[EpochRecord]] = []
        self.tasks: list[TaskReport] = []

    def to_the_end(self) -> EpochRecord:
        """From the last epoch that is finished; the record of the last that is worth it."""
        job, options, last = self._job, self._spec.options, self._resumed()
        ends: tuple[Node[EpochRecord], ...] = ()
        while last is None or not options.finished(last.epoch, last.best):
            end = self._epoch(last, ends)
            if last is not None:
                job.workspace.discard(last.state)
            job.dispatcher.graph.discard(node for node in self._nodes if node is not end)
            last, ends = end.value, (end,)
        return last

    def _resumed(self) -> EpochRecord | None:
        """Of the last epoch that was finished and whose state is there; None where training has not come to the end of one."""
        workspace, last = self._job.workspace, None
        for epoch in range(1, self._spec.options.epochs + 1):
            record = committed(workspace, Epoch.kind, epoch_key(self._spec, epoch), EpochRecord)
            if record is None:
                break
            if workspace.has(record.state):
                if last is not None:
                    workspace.discard(last.state)
                last = record
        return last

    def _epoch(self, before: EpochRecord | None, ends: tuple[Node[EpochRecord], ...]) -> Node[EpochRecord]:
        """The end of the epoch behind `before`, in which every round begins with what the one before has left. ends: the node
        of `before`, where this job has one."""
        graph, options = self._job.dispatcher.graph, self._spec.options
        epoch = 1 if before is None else before.epoch + 1
        states: tuple[Blob, ...] = () if before is None else (before.state,)
        earlier: tuple[Node[ReplicaRecord], ...] = ()
        loss = 0.0
        for number in range(options.rounds):
            make = partial(Replica, training=self._spec, epoch=epoch, round=number, states=states)
            reads = (*self._texts.originals, *(earlier or ends))
            nodes = tuple(graph.add(partial(make, replica=i), reads=reads) for i in range(options.replicas))
            records = self._run(nodes)
            graph.discard(earlier)
            earlier = nodes
            states = tuple(record.state for record in records)
            loss += sum(record.loss for record in records)
        make_end = partial(Epoch, training=self._spec, before=before, states=states, loss=loss)
        end = graph.add(make_end, reads=(*self._texts.originals, *earlier, *ends))
        self._run((end,))
        return end

    def _run(self, nodes: tuple[Node[Kept], ...]) -> list[Kept]:
        """The records of nodes that were just added, found or made."""
        self._nodes += nodes
        self._job.dispatcher.graph.open()
        records = self._job.dispatcher.run(nodes)
        self.tasks += [
            TaskReport(name=node.made().name, reused=node.reused, timing=node.value.timing) for node in nodes
        ]
        return records


def _spec(job: Job, texts: Texts, blocks: Blocks, outside: Outside) -> TrainingSpec:
    layout = job.source.layout
    head = (layout.names.norm, layout.names.embedding if layout.tied else layout.names.head)
    return TrainingSpec(
        setting=job.setting,
        options=texts.stage.training,
        tensors={name: job.digests[name] for name in head},
        outside=(outside.first.value.checkpoint, outside.last.value.checkpoint),
        blocks=tuple(_stored(record) for record in blocks.records),
        tokens=texts.tokens,
        targets=tuple(blob for node in texts.originals for blob in node.value.outputs),
        trained=texts.stage.trained,
        held_out=tuple(text.sequences for text in texts.texts.held_out),
    )


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
