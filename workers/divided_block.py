"""A block that several workers share: each solves some of its linears, and runs the compressed block over some of its shards.

What must be the same on all of them follows from the block's inputs alone: choices from the first shard, and forward passes,
which each worker runs for the statistics that it solves with. What they exchange are solved linears, as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from counterweight.workers.block import CompressedLinear, install
from counterweight.workers.calibrated_block import CalibratedBlock, look, prepared, streams
from counterweight.workers.clock import Clock
from counterweight.workers.compressed import read_linear
from counterweight.workers.compressed_block import in_passes, passed
from counterweight.workers.context import TaskContext
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.keys import digest
from counterweight.workers.loaded_block import read_ahead
from counterweight.workers.memory import release, trim
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.passing import pass_on
from counterweight.workers.shard import Stored, as_stored, kept_parameters, write_block
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.propagate import PropagatedRecord
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.solve import SolvedRecord
from counterweight.workers.tensor_blobs import get_tensors, put_tensors
from counterweight.workers.workspace import Blob, Workspace


def solved_part(
    context: TaskContext,
    spec: BlockSpec,
    linears: Sequence[str],
    workspace: Workspace,
    *,
    keeps: bool,
    following: BlockSpec | None = None,
) -> SolvedRecord:
    """These linears of a block; experts with none of them are not run. keeps: whether tensors that no recipe applies to are
    stored beside them. following: see `compressed`."""
    part = spec.solving_only(linears)
    clock = Clock(context.device)
    if context.held.make_room():
        release(context.device)
    held = prepared(context, part, workspace, clock)
    # Where experts are let go when they are solved, or the original is another block, a worker reads it again to run it.
    stays = spec.propagate == "compressed" and not held.loaded.lent and held.original is None
    held.original = None
    with held.loaded.block.asking(linears):
        look(context, part, held, workspace, lambda _: None)
    clock.lap("forward")
    trim()
    if following is not None:
        read_ahead(context, following.setting, following.index, following.tensors)
    found, reports = in_passes(context, part, held, workspace, clock)
    builder = context.source(spec.setting)[1]
    kept = kept_parameters(builder, spec) if keeps else ()
    stored = as_stored(builder, spec.index, held.loaded, found, context.device, kept=kept)
    blob = put_tensors(workspace, stored.tensors)
    clock.lap("write")
    if stays:
        context.held.hold(held.without_statistics(_prepared_key(spec)))
    record = SolvedRecord(blobs=(blob,), formats=stored.formats, modules=tuple(reports), timing=clock.timing())
    del held, found, stored
    release(context.device)
    return record


def propagated_stretch(
    context: TaskContext, spec: BlockSpec, solved: Sequence[SolvedRecord], stretch: range, workspace: Workspace
) -> PropagatedRecord:
    """What the compressed block makes of a stretch of its shards, and the original block of those that enter it."""
    clock = Clock(context.device)
    held = _compressed(context, spec, solved, workspace, clock)
    inputs, originals = (each[stretch.start : stretch.stop] for each in streams(context, spec, workspace))

    def emit(output: Tensor) -> Blob:
        return pass_on(context, workspace, output, room=spec.setting.room, lasting=spec.lasting)

    original_outputs: list[Blob] = []
    if held.original is not None:
        nothing = RunningStatistics(held.original, {})
        original_outputs = run_shards(held.original, originals, emit, nothing, context.shards)
    outputs = passed(context, spec, held.loaded.block, inputs, workspace)
    clock.lap("forward")
    context.held.hold(held)
    return PropagatedRecord(outputs=outputs, original_outputs=tuple(original_outputs), timing=clock.timing())


def joined(
    context: TaskContext,
    spec: BlockSpec,
    solved: Sequence[SolvedRecord],
    propagated: Sequence[PropagatedRecord],
    workspace: Workspace,
) -> BlockRecord:
    """The finished block of what workers have made of its parts. timing: of all of them together."""
    clock = Clock(context.device, Timing.of_all([*(one.timing for one in solved), *(one.timing for one in propagated)]))
    builder = context.source(spec.setting)[1]
    stored = _read(workspace, solved)
    clock.lap("load")
    places = {name: place for place, group in enumerate(builder.layout.block_linears(spec.index)) for name in group}
    reports = sorted((report for one in solved for report in one.modules), key=lambda report: places[report.name])
    record = write_block(spec, builder, stored, reports, workspace, clock.timing())
    clock.lap("write")
    return record.model_copy(
        update={
            "outputs": tuple(blob for one in propagated for blob in one.outputs),
            "original_outputs": tuple(blob for one in propagated for blob in one.original_outputs),
            "timing": clock.timing(),
        }
    )


def _prepared_key(spec: BlockSpec) -> str:
    """Of a block that can run, with what was chosen from its first shard, in a worker's memory."""
    return digest(["prepared", spec.key()])


def _compressed(
    context: TaskContext, spec: BlockSpec, solved: Sequence[SolvedRecord], workspace: Workspace, clock: Clock
) -> CalibratedBlock:
    """The block with its solved linears in their places; beside it the original where shards of it are passed on."""
    key = digest(["compressed", spec.key()])
    if (found := context.held.take(key)) is not None:
        return found
    if (held := context.held.take(_prepared_key(spec))) is None:
        if context.held.make_room():
            release(context.device)
        held = prepared(context, spec.solving_only(()), workspace, clock)
    held = held.without_statistics(key)
    if not spec.original_inputs:
        held.original = None
    elif held.original is None:
        held.original = held.loaded.block.replica()
    builder = context.source(spec.setting)[1]
    install(held.loaded.block, _linears(context, builder, spec, _read(workspace, solved)))
    clock.lap("load")
    return held


def _read(workspace: Workspace, solved: Sequence[SolvedRecord]) -> Stored:
    """All that these have of a block, every byte verified."""
    tensors: dict[str, Tensor] = {}
    formats: dict[str, ModuleFormat] = {}
    for blob in dict.fromkeys(blob for one in solved for blob in one.blobs):
        tensors |= get_tensors(workspace, blob)
    for one in solved:
        formats |= one.formats
    return Stored(tensors=tensors, formats=formats)


def _linears(
    context: TaskContext, builder: BlockBuilder, spec: BlockSpec, stored: Stored
) -> dict[str, CompressedLinear]:
    """The block's linears on the worker's device, by their names in it."""

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: stored.tensors[name] for name in names}

    layout = builder.layout
    return {
        name: read_linear(
            module := layout.module_name(spec.index, name),
            stored.formats[module],
            read,
            context.device,
            branch_of=layout.stock_name(module),
        )
        for name in spec.recipe
    }
