"""A block that has run over its calibration tokens: what solving needs to know of it, and what branches could win in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.clock import Clock
from counterweight.workers.context import DTYPES, TaskContext
from counterweight.workers.coverage import feed, judged_by, row_sample
from counterweight.workers.held_out import HeldOutRows, Rows
from counterweight.workers.interchange.compressed_tensors import scale_dtype
from counterweight.workers.loaded_block import LoadedBlock, load_block, smoothed
from counterweight.workers.memory import release, trim
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.passing import pass_on, receive
from counterweight.workers.prepare import prepare
from counterweight.workers.shards import Load, Output, RunningStatistics, run_shards
from counterweight.workers.solve import LayerState, gains
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.records import Timing
from counterweight.workers.workspace import Blob, Workspace


@dataclass(slots=True)
class CalibratedBlock:
    """A block with the sums over the shards that it has run over so far, held for the shards behind or for solving.

    key: `BlockSpec.statistics_key` of these shards. gatherings: what solving needs of each group's input; sums: of those of the
    first of `BlockSpec.passes`. original: the block as it was, which makes the outputs; None where that is
    `loaded`, or where no outputs are to be made any more. outliers: linear -> channels of its input that ASER takes out of its
    codes. outputs: hidden states behind the original block, none where nobody needs them. experts: how a sparse block's are
    calibrated. rows: tokens of its layer [tokens, hidden], for experts that saw too little and are solved in a further pass.
    unseen: rows of the shards that are held out, of all groups; None without such shards.
    """

    key: str
    loaded: LoadedBlock
    original: Block | None
    gatherings: Mapping[SharedInputGroup, Gathering]
    sums: RunningStatistics
    outliers: Mapping[str, Tensor]
    outputs: tuple[Blob, ...]
    timing: Timing
    experts: ExpertCalibration | None = None
    rows: Tensor | None = None
    unseen: HeldOutRows | None = None
    _statistics: PackedStatistics | None = None

    @property
    def statistics(self) -> PackedStatistics:
        """Of all shards, from the first time that it is asked for. RequestError for activations that are not finite."""
        if self._statistics is None:
            self.rows = self.sums.take_rows()
            self._statistics = self.fed(self.sums.result())
            if len(self.sums.gatherings) == len(self.gatherings):
                self.rows = None
        return self._statistics

    def fed(self, statistics: PackedStatistics) -> PackedStatistics:
        """The same of a pass; those of experts that saw too little are shrunk toward the layer's (`calibration.shrinkage`)."""
        if self.rows is not None and self.experts is not None:
            feed(self.loaded.block, statistics, self.gatherings, self.rows, self.experts)
        return statistics

    def held_out(self, statistics: PackedStatistics) -> dict[SharedInputGroup, Rows]:
        """Rows of tokens that nothing is solved on, of the groups of these statistics."""
        return {} if self.unseen is None else judged_by(self.loaded.block, statistics, self.unseen)

    def without_statistics(self, key: str) -> CalibratedBlock:
        """What is left to run it, to be held by this key."""
        nothing = RunningStatistics(self.loaded.block, {})
        return replace(self, key=key, sums=nothing, rows=None, unseen=None, _statistics=None)

    @property
    def bytes(self) -> int:
        """Memory that it takes, on host and device together."""
        kept = (0 if self.rows is None else self.rows.nbytes) + (0 if self.unseen is None else self.unseen.bytes)
        return self.loaded.bytes + self.sums.bytes + kept + (0 if self._statistics is None else self._statistics.bytes)


def streams(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> tuple[list[Load], list[Load]]:
    """Loaders of the shards that enter the block, and of those that enter it in the original model where they differ."""

    def loader(blob: Blob) -> Load:
        return lambda: receive(context, workspace, blob)

    return [loader(blob) for blob in spec.inputs], [loader(blob) for blob in spec.original_inputs]


def calibrated(
    context: TaskContext, spec: BlockSpec, workspace: Workspace, *, start: int = 0, more: bool = False
) -> CalibratedBlock:
    """The block with the statistics of all of `spec.inputs`: what is in memory, which is held no longer, or made now.

    start: shards before this one have been run over; where what they left is in memory, only the others are. more: whether
    further shards will follow, so that the block must go on making outputs.
    """
    if (held := context.held.take(spec.statistics_key())) is not None:
        return held
    begun = context.held.take(spec.before(start).statistics_key()) if start else None
    clock = Clock(context.device, None if begun is None else begun.timing)
    if begun is None:
        if context.held.make_room():
            release(context.device)  # whatever else ends before gives back what it held itself
        start, begun = 0, prepared(context, spec, workspace, clock)
    inputs, originals = (each[start:] for each in streams(context, spec, workspace))

    def emit(output: Tensor) -> Blob | None:
        if not _makes_outputs(spec):
            return None
        return pass_on(context, workspace, output, room=spec.setting.room, lasting=spec.lasting)

    if begun.original is None:
        outputs = look(context, spec, begun, workspace, emit, start=start)
    else:
        # What the original block makes is shared between recipes, so it comes from the block as it was.
        nothing = RunningStatistics(begun.original, {})
        outputs = run_shards(begun.original, originals or inputs, emit, nothing, context.shards)
        begun.original = begun.original if more else None
        look(context, spec, begun, workspace, lambda _: None, start=start)
    clock.lap("forward")
    begun.key = spec.statistics_key()
    begun.outputs = (*begun.outputs, *(blob for blob in outputs if blob is not None))
    if not more:
        trim()  # before, what is given back is asked for again by the next stretch
        _ = begun.statistics  # now, so that an activation that is not finite is the calibration's error
    begun.timing = clock.timing()
    return begun


def look(
    context: TaskContext,
    spec: BlockSpec,
    held: CalibratedBlock,
    workspace: Workspace,
    emit: Callable[[Tensor], Output],
    *,
    start: int = 0,
) -> list[Output]:
    """Runs the block over its shards from `start` on: sums of those that are solved on, of all groups or of those that lack
    tokens; rows of those that are held out. What `emit` makes of each output."""
    inputs, originals = streams(context, spec, workspace)
    first, seen = (max(start, end) for end in spec.ends)
    block, shards = held.loaded.block, context.shards
    outputs = run_shards(block, inputs[start:first], emit, held.sums, shards, originals[start:first])
    if inputs[first:seen]:
        drawn = held.sums.drawing(spec.experts)
        outputs += run_shards(block, inputs[first:seen], emit, drawn, shards, originals[first:seen])
    if held.unseen is not None and inputs[seen:]:
        outputs += run_shards(block, inputs[seen:], emit, held.unseen, shards, originals[seen:])
    return outputs


def _makes_outputs(spec: BlockSpec) -> bool:
    """Whether somebody waits for what the original block makes."""
    return spec.propagate == "original" or bool(spec.original_inputs)


def prepared(context: TaskContext, spec: BlockSpec, workspace: Workspace, clock: Clock) -> CalibratedBlock:
    """The block before its first shard. 1. Read it and verify every byte. 2. Decide from the first shard what needs rows of
    inputs and not moments: scales, outliers, clips."""
    dtype = DTYPES[spec.setting.compute_dtype]
    loaded = load_block(context, spec.setting, spec.index, spec.tensors, dtype, lent=spec.lends)
    clock.lap("load")
    builder = context.source(spec.setting)[1]
    family = family_of(builder.config.model_type)
    first = streams(context, spec, workspace)[0][0]
    judged = spec.held_out_from is not None
    chosen = prepare(loaded.block, spec.recipe, loaded.parameters, family, loaded.online, first, judged=judged)
    original = None
    if chosen.scales:
        original = loaded.block if _makes_outputs(spec) else None
        loaded = smoothed(context, builder, spec.index, loaded, chosen.scales, dtype)
    return CalibratedBlock(
        key="",
        loaded=loaded,
        original=original,
        gatherings=chosen.gatherings,
        sums=first_sums(spec, loaded.block, chosen.gatherings),
        unseen=held_out_rows(spec, loaded.block, chosen.gatherings),
        outliers=chosen.outliers,
        outputs=(),
        timing=clock.timing(),
        experts=spec.experts,
    )


def first_sums(spec: BlockSpec, block: Block, gatherings: Mapping[SharedInputGroup, Gathering]) -> RunningStatistics:
    """Those of the first pass over the shards, which keeps tokens for the starved experts of all passes."""
    sample = row_sample(block, gatherings, spec.experts)
    return RunningStatistics(block, of_pass(spec, 0, gatherings), every_token=spec.every_token, sample=sample)


def held_out_rows(
    spec: BlockSpec, block: Block, gatherings: Mapping[SharedInputGroup, Gathering]
) -> HeldOutRows | None:
    """What keeps rows of the shards that are held out, for what is solved; None without any."""
    if spec.held_out_from is None:
        return None
    passes = [of_pass(spec, place, gatherings) for place in range(max(1, len(spec.passes)))]
    return HeldOutRows(block, {group: gathering for own in passes for group, gathering in own.items()})


def of_pass(
    spec: BlockSpec, place: int, gatherings: Mapping[SharedInputGroup, Gathering]
) -> dict[SharedInputGroup, Gathering]:
    """Of the groups whose statistics are gathered in a pass over the shards."""
    if not spec.passes:
        return dict(gatherings)
    own = set(spec.passes[place])
    return {group: gathering for group, gathering in gatherings.items() if not own.isdisjoint(group)}


def gathered(
    context: TaskContext, spec: BlockSpec, held: CalibratedBlock, workspace: Workspace
) -> Iterator[PackedStatistics]:
    """Statistics pass by pass: those that the block came with, then those of the further passes, which run it again as far as
    the inputs of their linears need. One of them is in memory at a time where the caller lets go."""
    yield held.statistics
    for place in range(1, len(spec.passes)):
        gatherings = of_pass(spec, place, held.gatherings)
        block = held.loaded.block
        sums = RunningStatistics(block, gatherings, every_token=spec.every_token)
        inputs, originals = streams(context, spec.solving, workspace)
        paired = any(not is_expert(group[0]) for group in gatherings)
        with block.asking(name for group in gatherings for name in group):
            run_shards(block, inputs, lambda _: None, sums, context.shards, originals if paired else ())
        further = streams(context, spec, workspace)[0][slice(*spec.ends)]
        if further and (drawn := sums.drawing(spec.experts)).gatherings:
            with block.asking(name for group in drawn.gatherings for name in group):
                run_shards(block, further, lambda _: None, drawn, context.shards)
        trim()
        yield held.fed(sums.result())


def branch_gains(
    context: TaskContext, spec: BlockSpec, held: CalibratedBlock, workspace: Workspace
) -> dict[str, tuple[float, ...]]:
    """Linear -> what each further rank of its branch would take off its relative error."""
    found: dict[str, tuple[float, ...]] = {}
    of_all = (item for packed in gathered(context, spec, held, workspace) for item in packed.items())
    for group, statistics in of_all:
        for name in group:
            part = spec.recipe.get(name)
            if part is None or part.compensation.branch_rank is None:
                continue
            dtype = held.loaded.dtypes[f"{name}.weight"]
            layer = LayerState(
                weight=held.loaded.parameters[f"{name}.weight"].float().to(context.device),
                statistics=statistics,
                scale_dtype=scale_dtype(name, dtype),
                factor_dtype=dtype,
                outliers=held.outliers.get(name),
            )
            (own,) = gains(part, [layer])
            found[name] = tuple(own.tolist())
    return found
