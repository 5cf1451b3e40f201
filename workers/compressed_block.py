"""A calibrated block on its way to a finished checkpoint shard: tuned, solved, run for the next one, stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from counterweight.kernels.weights import StoredWeight
from counterweight.workers.block import CompressedLinear, compress, install
from counterweight.workers.calibrated_block import (
    CalibratedBlock,
    calibrated,
    first_sums,
    gathered,
    held_out_rows,
    look,
    streams,
)
from counterweight.workers.calibration.packed import PackedStatistics
from counterweight.workers.clock import Clock
from counterweight.workers.context import DTYPES, TaskContext
from counterweight.workers.interchange.compressed_tensors import scale_dtype
from counterweight.workers.loaded_block import read_ahead, smoothed
from counterweight.workers.memory import release, trim
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.families import family_of
from counterweight.workers.passing import pass_on
from counterweight.workers.shard import as_stored, kept_parameters, write_block
from counterweight.workers.shards import Load
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.records import ModuleReport
from counterweight.workers.tuning.lsi import LinearFormat, learned_scales
from counterweight.workers.workspace import Blob, Workspace


def compressed(
    context: TaskContext,
    spec: BlockSpec,
    workspace: Workspace,
    *,
    following: BlockSpec | None = None,
    keep: bool = False,
) -> BlockRecord:
    """The block's record: 1. calibrate, 2. train codes where the recipe asks for it, 3. solve every linear, those of each pass
    over the shards behind it, 4. run the compressed block where the next one sees what it makes, 5. store.

    following: a block whose weights are read beside all but the first step. keep: what is calibrated stays as it is, in memory,
    for the block to be compressed in another way.
    """
    held = calibrated(context, spec, workspace)
    if following is not None:
        read_ahead(context, following.setting, following.index, following.tensors)
    clock = Clock(context.device, held.timing)
    held, codes = tuned(context, spec, held, workspace)
    linears, reports = in_passes(context, spec, held, workspace, clock, codes, keep=keep)
    outputs = propagated(context, spec, held.loaded.block, linears, workspace)
    clock.lap("forward")
    builder = context.source(spec.setting)[1]
    kept = kept_parameters(builder, spec)
    stored = as_stored(builder, spec.index, held.loaded, linears, context.device, kept=kept)
    record = write_block(spec, builder, stored, reports, workspace, held.timing)
    clock.lap("write")
    originals = held.outputs if spec.original_inputs else ()
    record = record.model_copy(
        update={"outputs": outputs, "original_outputs": originals, "timing": clock.timing()},
    )
    if keep:
        context.held.hold(held)
    del held, linears, stored
    release(context.device)
    return record


def in_passes(
    context: TaskContext,
    spec: BlockSpec,
    held: CalibratedBlock,
    workspace: Workspace,
    clock: Clock,
    codes: Mapping[str, StoredWeight] | None = None,
    *,
    keep: bool = False,
) -> tuple[dict[str, CompressedLinear], list[ModuleReport]]:
    """The linears of all passes over the shards, in the host's memory. keep: see `compressed`."""
    linears: dict[str, CompressedLinear] = {}
    reports: list[ModuleReport] = []
    for statistics in gathered(context, spec, held, workspace):
        clock.lap("forward")
        used = PackedStatistics(statistics.packed) if keep else statistics
        found, told = solved(context, spec, held, used, codes)
        linears |= found
        reports += told
        clock.lap("solve")
        trim()
    return linears, reports


def solved(
    context: TaskContext,
    spec: BlockSpec,
    held: CalibratedBlock,
    statistics: PackedStatistics,
    codes: Mapping[str, StoredWeight] | None,
) -> tuple[dict[str, CompressedLinear], list[ModuleReport]]:
    """The linears whose statistics there are, which are used up, in the host's memory."""
    loaded = held.loaded
    own = {name: spec.recipe[name] for group in statistics for name in group if name in spec.recipe}
    dtypes = {name: loaded.dtypes[f"{name}.weight"] for name in own}
    linears, reports = compress(
        {name: loaded.parameters[f"{name}.weight"] for name in own},
        statistics,
        own,
        scale_dtypes={name: scale_dtype(name, dtype) for name, dtype in dtypes.items()},
        factor_dtypes=dtypes,
        outliers=held.outliers,
        codes=codes,
        held_out=held.held_out(statistics),
        batch_bytes=spec.batch_bytes,
        device=context.device,
        pool=context.pool,
    )
    loaded.let_go(own)
    host = torch.device("cpu")
    found = {name: replace(one.to(host), transform=loaded.online.get(name)) for name, one in linears.items()}
    return found, reports


def tuned(
    context: TaskContext, spec: BlockSpec, held: CalibratedBlock, workspace: Workspace
) -> tuple[CalibratedBlock, dict[str, StoredWeight] | None]:
    """Codes that were trained, where the recipe asks for it; and what is held, with the transforms that were learned."""
    tunings = {part.tuning for part in spec.recipe.values() if part.tuning is not None}
    if not tunings:
        return held, None
    (options,) = tunings
    inputs, originals = streams(context, spec.solving, workspace)
    loaded = held.loaded
    groups = {name: group for group in loaded.block.groups for name in group}
    formats = {
        name: LinearFormat(
            weights=grid,
            scale_dtype=scale_dtype(name, loaded.dtypes[f"{name}.weight"]),
            activations=held.gatherings[groups[name]].activations,
        )
        for name, part in spec.recipe.items()
        if (grid := part.weights.trained_grid) is not None  # which a recipe with tuning asks for
    }
    targets = [loaded.block.run(load()) for load in originals or inputs]
    found = options.tune(loaded.block, [load() for load in inputs], targets, formats)
    if not found.norms:
        return held, dict(found.weights)
    builder = context.source(spec.setting)[1]
    scales = learned_scales(family_of(builder.config.model_type), loaded.block.groups, loaded.parameters, found.norms)
    loaded = smoothed(context, builder, spec.index, loaded, scales, DTYPES[spec.setting.compute_dtype])
    tuned = replace(
        held,
        loaded=loaded,
        sums=first_sums(spec, loaded.block, held.gatherings),
        unseen=held_out_rows(spec, loaded.block, held.gatherings),
        _statistics=None,
    )
    look(context, spec, tuned, workspace, lambda _: None)
    return tuned, dict(found.weights)


def propagated(
    context: TaskContext,
    spec: BlockSpec,
    block: Block,
    linears: Mapping[str, CompressedLinear],
    workspace: Workspace,
) -> tuple[Blob, ...]:
    """Hidden states behind the compressed block; none where blocks see the original's."""
    if spec.propagate == "original":
        return ()
    install(block, {name: linear.to(context.device) for name, linear in linears.items()})
    return passed(context, spec, block, streams(context, spec, workspace)[0], workspace)


def passed(
    context: TaskContext, spec: BlockSpec, block: Block, inputs: Sequence[Load], workspace: Workspace
) -> tuple[Blob, ...]:
    """What the block makes of these shards."""
    outputs = context.shards.run(
        inputs,
        read=lambda load: load(),
        compute=lambda hidden: (None, block.run(hidden)),
        take=lambda _: None,
        write=lambda output: pass_on(context, workspace, output, room=spec.setting.room, lasting=spec.lasting),
    )
    return tuple(outputs)
