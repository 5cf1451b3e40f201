"""A calibrated block on its way to a finished checkpoint shard: tuned, solved, run for the next one, stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from counterweight.kernels.weights import StoredWeight
from counterweight.workers.block import CompressedLinear, compress, install
from counterweight.workers.calibrated_block import CalibratedBlock, calibrated, streams
from counterweight.workers.clock import Clock
from counterweight.workers.context import DTYPES, TaskContext, put_hidden
from counterweight.workers.interchange.compressed_tensors import scale_dtype
from counterweight.workers.loaded_block import smoothed
from counterweight.workers.memory import release, trim
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.families import family_of
from counterweight.workers.shard import write_block
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tuning.lsi import LinearFormat, learned_scales
from counterweight.workers.workspace import Blob, Workspace


def compressed(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> BlockRecord:
    """The block's record: 1. calibrate, 2. train codes where the recipe asks for it, 3. solve every linear, 4. run the
    compressed block where the next one sees what it makes, 5. store."""
    held = calibrated(context, spec, workspace)
    clock = Clock(context.device, held.timing)
    held, codes = tuned(context, spec, held, workspace)
    weights = {name: held.loaded.parameters[f"{name}.weight"] for name in spec.recipe}
    linears, reports = compress(
        {name: weight.to(context.device) for name, weight in weights.items()},
        held.statistics,
        spec.recipe,
        starved=held.starved,
        scale_dtypes={name: scale_dtype(name, held.loaded.dtypes[f"{name}.weight"]) for name in weights},
        factor_dtypes={name: held.loaded.dtypes[f"{name}.weight"] for name in weights},
        outliers=held.outliers,
        codes=codes,
        pool=context.pool,
    )
    linears = {name: replace(linear, transform=held.loaded.online.get(name)) for name, linear in linears.items()}
    clock.lap("solve")
    trim()
    outputs = propagated(context, spec, held.loaded.block, linears, workspace)
    clock.lap("forward")
    _, builder = context.source(spec.setting)
    record = write_block(
        spec, builder, held.loaded.parameters, held.loaded.dtypes, linears, reports, workspace, held.timing
    )
    clock.lap("write")
    originals = held.outputs if spec.original_inputs else ()
    record = record.model_copy(
        update={"outputs": outputs, "original_outputs": originals, "timing": clock.timing()},
    )
    del held, linears
    release(context.device)
    return record


def tuned(
    context: TaskContext, spec: BlockSpec, held: CalibratedBlock, workspace: Workspace
) -> tuple[CalibratedBlock, dict[str, StoredWeight] | None]:
    """Codes that were trained, where the recipe asks for it; and what is held, with the transforms that were learned."""
    tunings = {part.tuning for part in spec.recipe.values() if part.tuning is not None}
    if not tunings:
        return held, None
    (options,) = tunings
    inputs, originals = streams(context, spec, workspace)
    loaded = held.loaded
    groups = {name: group for group in loaded.block.groups for name in group}
    formats = {
        name: LinearFormat(
            weights=grid,
            scale_dtype=scale_dtype(name, loaded.dtypes[f"{name}.weight"]),
            activations=held.statistics[groups[name]].activations,
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
    sums = RunningStatistics(loaded.block, held.sums.gatherings, spec.experts)
    run_shards(loaded.block, inputs, lambda _: None, sums, context.pool, originals)
    return replace(held, loaded=loaded, sums=sums, starved={}, _statistics=None), dict(found.weights)


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
    install(block, linears)
    inputs, _ = streams(context, spec, workspace)
    return tuple(context.pool.map(lambda load: put_hidden(workspace, block.run(load())), inputs))
