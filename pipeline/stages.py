"""The stages of a job. Each adds nodes to the job's graph, or runs those that are there, and returns a value."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from counterweight.pipeline.allocation import budgeted, share_out
from counterweight.pipeline.artifact import Artifact, FileEntry
from counterweight.pipeline.artifact.assemble import Parts
from counterweight.pipeline.artifact.report import TaskReport
from counterweight.pipeline.behind import behind_blocks
from counterweight.pipeline.blocks import BlockNodes, BlockRecipe, Blocks, Budget, stretches
from counterweight.pipeline.carrying import carrying
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.events import BlockDone, EventLog, FellBack, Planned, StageEntered, WindowsDone
from counterweight.pipeline.graph import Node, giving
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.plan import Plan
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.resume import Earlier, parts_of
from counterweight.pipeline.tokens import Tokens
from counterweight.pipeline.validate import Reference, Windows, add_originals, validate
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.errors import RequestError
from counterweight.workers.matrix_bytes import SINGLE
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.pass_through import PassThrough, PassThroughRecord
from counterweight.workers.tasks.records import HiddenRecord, LedgerEntry
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import Blob, Workspace


@dataclass(slots=True)
class Stopwatch:
    """Wall seconds per stage."""

    log: EventLog
    seconds: dict[str, float] = field(default_factory=dict)
    _stage: str = ""
    _since: float = 0.0

    def stage(self, name: str) -> None:
        """Ends the running stage and begins the next; an empty name only ends."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = name, now
        if name:
            self.log.emit(StageEntered(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all stages of a job share. digests: source tensor -> sha256."""

    job: CompressionJob
    source: ModelSource
    plan: Plan
    setting: Setting
    workspace: Workspace
    dispatcher: Dispatcher
    log: EventLog
    digests: Mapping[str, str]
    threads: int
    """Of a worker."""
    resume: Resume = Resume.AUTO


@dataclass(frozen=True, slots=True)
class Outside:
    """What lies outside the blocks: the embedding before them, norm and head behind, what a multimodal model has beside its
    text model, and what nobody needs."""

    first: Node[PassThroughRecord]
    last: Node[PassThroughRecord]
    beside: Node[PassThroughRecord] | None
    dropped: tuple[LedgerEntry, ...]

    @property
    def behind(self) -> list[Node[PassThroughRecord]]:
        """All but the first."""
        return [self.last, *([] if self.beside is None else [self.beside])]


def stretches_of(job: Job, tokens: Tokens) -> list[range]:
    """Of the calibration's shards, in order: drawn ones and held-out ones are behind the others."""
    return stretches(
        sum(shard_count(each) for each in (tokens.calibration, tokens.drawn, tokens.unseen)),
        job.source.layout.blocks,
        job.dispatcher.workers,
        job.threads,
        gpu=job.setting.device == "cuda",
    )


def add_embedding(job: Job, tokens: Tokens) -> list[Node[HiddenRecord]]:
    """The nodes that make what enters block 0, one for each stretch: of the calibration tokens, drawn ones, held-out ones."""
    embedding = job.source.layout.names.embedding
    further = [each.ids for each in (tokens.drawn, tokens.unseen) if each is not None]
    read = TokenSet(torch.cat([tokens.calibration.ids, *further]))
    cost = carrying(job.source, [embedding], rotated=job.setting.rotation is not None)
    whole = Embed(
        setting=job.setting,
        tokens=stored_tokens(job, read),
        tensor=(embedding, job.digests[embedding]),
        drawn=0 if tokens.drawn is None else tokens.drawn.sequences,
        held_out=0 if tokens.unseen is None else tokens.unseen.sequences,
        bytes=cost.bytes + SINGLE * read.sequences * read.length * job.source.layout.hidden_size,
        flops=cost.flops,
    )
    parts = stretches_of(job, tokens)
    if len(parts) == 1:
        return [job.dispatcher.graph.add(giving(whole))]
    nodes = [job.dispatcher.graph.add(giving(whole.of(part.start, part.stop))) for part in parts]
    # By the record of the whole a job on another number of workers finds what was made of these shards.
    job.dispatcher.graph.add(lambda: whole.joined(node.value for node in nodes), after=nodes, makes=False)
    return nodes


def add_model(
    job: Job,
    embedded: Sequence[Node[HiddenRecord]],
    tokens: Tokens,
    outlined: Sequence[BlockSpec],
    *,
    shared: bool = True,
) -> Blocks:
    """The nodes of all blocks, compressed as the recipe says. embedded: what `add_embedding` makes of the tokens. outlined:
    each block without what enters it. shared: whether workers may share a block."""
    spec, source = job.job.spec, job.source
    recipes: list[BlockRecipe] = [block.recipe for block in outlined]
    passing = job.plan.hidden_states

    def lasting(index: int) -> bool:
        return not job.setting.room or passing.lasting(index)

    propagate = spec.calibration.propagated

    def spec_of(
        index: int,
        recipe: BlockRecipe,
        inputs: tuple[Blob, ...],
        original_inputs: tuple[Blob, ...],
        propagate: Literal["original", "compressed"],
    ) -> BlockSpec:
        return outlined[index].model_copy(
            update={
                "inputs": inputs,
                "original_inputs": original_inputs,
                "recipe": recipe,
                "propagate": propagate,
                "lasting": lasting(index),
            }
        )

    budget = None
    if shares := budgeted(recipes):
        budget = Budget(
            blocks=shares,
            share=lambda gains: share_out(source, recipes, gains),
            bytes=[block.calibrated_bytes for block in job.plan.blocks],
        )
    nodes = BlockNodes(
        graph=job.dispatcher.graph,
        recipes=recipes,
        spec_of=spec_of,
        propagate=propagate,
        budget=budget,
        stretches=stretches_of(job, tokens),
        segment=spec.calibration.segment_blocks,
        workers=job.dispatcher.workers,
        ahead=job.setting.device == "cuda",
        lasting=lasting,
        units=[block.units for block in job.plan.blocks] if shared else (),
    )
    return nodes.add(embedded)


def add_outside(job: Job) -> Outside:
    """The nodes that carry over what lies outside the blocks; workers do them when no block is to be done."""
    digests, layout, rotation = job.digests, job.source.layout, job.setting.rotation
    names, beside = layout.names, job.source.beside
    dropped = dict(job.source.dropped)
    last = [names.norm]
    if names.head in digests and layout.tied:
        dropped[names.head] = "tied: equal to the embedding, stored once"
    if not layout.tied:
        last.append(names.head)
    elif rotation is not None and rotation.unties:
        last.append(names.embedding)  # rotated with the norm fused into it, it is the embedding no longer

    def carried(tensors: Sequence[str], reason: str = "") -> Node[PassThroughRecord]:
        cost = carrying(job.source, tensors, rotated=job.setting.rotation is not None)
        task = PassThrough(
            setting=job.setting,
            tensors={name: digests[name] for name in tensors},
            reason=reason,
            bytes=cost.bytes,
            flops=cost.flops,
        )
        return job.dispatcher.graph.add(lambda: task)

    entries = tuple(
        LedgerEntry(
            source=name,
            shape=job.source.checkpoint.entry(name).shape,
            fate="dropped",
            stored_as=(),
            reason=reason,
        )
        for name, reason in dropped.items()
    )
    carried_beside = carried(beside, "not of the text model") if beside else None
    return Outside(carried([names.embedding]), carried(last), carried_beside, entries)


def compress_blocks(job: Job, blocks: Blocks, outlined: Sequence[BlockSpec], validated: int = 0) -> list[BlockRecord]:
    """Runs what earlier jobs have not finished; the records of all blocks. outlined: as for `add_model`. validated: tokens that
    the model will be validated on. RequestError where earlier work is asked for and there is none."""
    job.dispatcher.graph.open()
    count, reused = len(blocks.compress), blocks.reused
    reasons = _not_reused(job, blocks, outlined)
    if job.resume is Resume.REQUIRED and not reused:
        why = "; ".join(reasons) or "no block was ever finished in this output"
        raise RequestError(f"--resume required: none of {count} blocks can be reused: {why}")
    job.log.emit(Planned(count, len(reused), behind_blocks(job.plan, job.source.layout, validated)))
    if reused:
        job.log.note(f"resuming: {len(reused)} of {count} blocks were finished before and are reused")
    for reason in reasons:
        job.log.note(f"not reused: {reason}")
    for record in reused:
        job.log.emit(block_done(record, reused=True))

    def finished(node: Node[BlockRecord]) -> None:
        job.log.emit(block_done(node.value, reused=False))
        for module in node.value.modules:
            for fallback in module.fallbacks:
                job.log.emit(FellBack(module.name, fallback.step, fallback.cause))

    return job.dispatcher.run(blocks.compress, finished)


def _not_reused(job: Job, blocks: Blocks, outlined: Sequence[BlockSpec]) -> list[str]:
    """Why blocks have to be compressed, a line for each kind of difference to what earlier jobs have finished."""
    missing = {index: node for index, node in enumerate(blocks.compress) if not node.reused}
    if job.resume is Resume.NEVER or not missing:
        return []
    earlier = Earlier.of(job.workspace.store, len(blocks.compress))
    if not earlier.finished:
        return []
    known = {index: blocks.spec(index) for index, node in missing.items() if node.known}
    return earlier.reasons({index: parts_of(known.get(index, outlined[index])) for index in missing})


def gather_parts(job: Job, blocks: Blocks, outside: Outside) -> Parts:
    """Everything that an artifact is made of."""
    first, last, *beside = job.dispatcher.run([outside.first, *outside.behind])
    return Parts(first, blocks.records, last, outside.dropped, *beside)


def add_references(job: Job, tokens: Tokens) -> list[Reference]:
    """The nodes of what the original makes of the windows of the validation; none without one."""
    asked, windows = job.job.spec.validation, tokens.judged
    if asked is None or windows is None:
        return []
    whole = Original(
        setting=job.setting.uncompressed(),
        tensors=job.digests,
        tokens=stored_tokens(job, windows),
        start=0,
        stop=windows.sequences,
        dtype=asked.compute_dtype,
    )
    return add_originals(job.dispatcher.graph, whole, windows.length, job.dispatcher.workers)


def measure(
    job: Job, references: Sequence[Reference], artifact: Artifact, files: Mapping[str, FileEntry]
) -> tuple[Windows, list[TaskReport]]:
    """The windows of the validation under every model, and what measuring them cost."""

    def done(finished: int, total: int) -> None:
        job.log.emit(WindowsDone(finished, total))

    return validate(job.dispatcher, references, artifact, files, done)


def shard_count(tokens: TokenSet | None) -> int:
    """Shards of hidden states that a token set makes."""
    return 0 if tokens is None else -(-tokens.sequences // shard_sequences(tokens.length))


def stored_tokens(job: Job, tokens: TokenSet) -> Blob:
    """The ids as a blob of the workspace."""
    return put_tensors(job.workspace, {"input_ids": tokens.ids})


def block_done(record: BlockRecord, *, reused: bool) -> BlockDone:
    """The event of a finished block, with its modules' mean errors."""

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return BlockDone(
        block=record.index,
        seconds=record.timing.total,
        peak_bytes=record.timing.host_peak_bytes,
        error_quantized=mean([m.error_before for m in record.modules if m.error_before is not None]),
        error_compensated=mean([m.error_after for m in record.modules if m.error_after is not None]),
        reused=reused,
    )
