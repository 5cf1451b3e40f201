"""A block's way through a worker: read, run for its statistics, tuned, solved, stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.block import CompressedLinear, calibrate, compress, install
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.clock import Clock
from counterweight.workers.context import DTYPES, TaskContext, put_hidden
from counterweight.workers.errors import CheckpointError
from counterweight.workers.interchange.compressed_tensors import scale_dtype
from counterweight.workers.memory import release
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.prepare import prepare
from counterweight.workers.recipe import Weights
from counterweight.workers.shard import write_block
from counterweight.workers.solve import gains
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.transforms.rotation import rotate_block
from counterweight.workers.transforms.smoothing import fold
from counterweight.workers.tuning.lsi import LinearFormat, tune
from counterweight.workers.workspace import Blob, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBlock:
    """A source block that can run, and what it was made of.

    parameters: in the recipe's coordinates; what is kept is carried over, the rest is solved. dtypes: of the parameters in
    the source, in which they are stored. online: linear -> transform of its input at inference.
    """

    block: Block
    parameters: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    online: dict[str, Hadamard]


@dataclass(frozen=True, slots=True)
class CalibratedBlock:
    """What calibration found, kept for solving. key: of the compressed block. outliers: channels of the input that ASER takes
    out of the codes. outputs: hidden states behind the original block, none where nobody needs them."""

    key: str
    loaded: LoadedBlock
    outliers: Mapping[SharedInputGroup, Tensor]
    statistics: dict[SharedInputGroup, InputStatistics]
    outputs: tuple[Blob, ...]
    timing: Timing


Load = Callable[[], Tensor]
"""Reads one shard of hidden states."""


def loader(workspace: Workspace, blob: Blob, device: torch.device) -> Load:
    """Reads the shard in `blob` when it is called."""
    return lambda: workspace.get_tensors(blob)["hidden"].to(device)


def load_block(
    context: TaskContext, setting: Setting, index: int, digests: Mapping[str, str], dtype: torch.dtype
) -> LoadedBlock:
    """A source block on the device, every tensor verified, in the setting's coordinates."""
    checkpoint, builder = context.source(setting)
    slices = builder.layout.sources(index, checkpoint.names)
    tensors = checkpoint.read_many(digests, sha256=digests)
    absent = {part.source for part in slices.values()} - tensors.keys()
    if absent:
        raise CheckpointError(f"block {index}: the task lists no digest for {sorted(absent)[:3]}")
    parameters = {name: part.of(tensors[part.source]) for name, part in slices.items()}
    dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
    online: dict[str, Hadamard] = {}
    if setting.rotation is not None:
        parameters, online = rotate_block(
            builder.config.model_type,
            parameters,
            setting.rotation,
            heads=builder.config.num_attention_heads,
            key_value_heads=builder.config.num_key_value_heads,
        )
    block = run_block(context, builder, index, parameters, online, dtype)
    return LoadedBlock(block=block, parameters=parameters, dtypes=dtypes, online=online)


def run_block(
    context: TaskContext,
    builder: BlockBuilder,
    index: int,
    parameters: Mapping[str, Tensor],
    online: Mapping[str, Hadamard],
    dtype: torch.dtype,
) -> Block:
    """The block on the device, with the transforms of its inputs that there are at inference."""
    block = builder.block(index, parameters, context.device, dtype)
    for name, transform in online.items():
        block.transform_input(name, transform)
    return block


def streams(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> tuple[list[Load], list[Load]]:
    """Loaders of the shards that enter the block, and of those that enter it in the original model where they differ."""
    loads = [loader(workspace, blob, context.device) for blob in spec.inputs]
    return loads[: spec.shards], loads[spec.shards :]


def calibrated(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> CalibratedBlock:
    """The block's calibration: what is in memory, or made now.

    1. Read the block and verify every byte. 2. Decide from the first shard what needs rows of inputs and not moments: scales,
    outliers, clips. 3. Run the original block, store its outputs, gather the statistics; of the scaled block where there are
    scales.
    """
    key = spec.key()
    if context.calibrated is not None and context.calibrated.key == key:
        return context.calibrated
    context.calibrated = None
    release(context.device)
    clock = Clock(context.device)
    dtype = DTYPES[spec.setting.compute_dtype]
    loaded = load_block(context, spec.setting, spec.index, spec.tensors, dtype)
    block = loaded.block
    clock.lap("load")
    keep_outputs = spec.propagate == "original" or spec.paired

    def emit(output: Tensor) -> Blob | None:
        return put_hidden(workspace, output) if keep_outputs else None

    inputs, originals = streams(context, spec, workspace)
    builder = context.source(spec.setting)[1]
    family = family_of(builder.config.model_type)
    chosen = prepare(block, spec.recipe, loaded.parameters, family, loaded.online, inputs[0])
    if chosen.scales:
        # What the original block makes is shared between recipes, so it comes from the block as it was.
        _, outputs = calibrate(block, originals or inputs, emit, {}, context.pool) if keep_outputs else ({}, [])
        parameters = fold(family, chosen.scales, loaded.parameters, loaded.online, heads=block.heads)
        loaded = replace(
            loaded,
            parameters=parameters,
            block=run_block(context, builder, spec.index, parameters, loaded.online, dtype),
        )
        statistics, _ = calibrate(loaded.block, inputs, lambda _: None, chosen.gatherings, context.pool, originals)
    else:
        statistics, outputs = calibrate(block, inputs, emit, chosen.gatherings, context.pool, originals)
    clock.lap("forward")
    stored = tuple(blob for blob in outputs if blob is not None)
    context.calibrated = CalibratedBlock(
        key=key,
        loaded=loaded,
        statistics=statistics,
        outliers=chosen.outliers,
        outputs=stored,
        timing=clock.timing(),
    )
    return context.calibrated


def compressed(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> BlockRecord:
    """The block's record: 1. calibrate, 2. train codes where the recipe asks for it, 3. solve every linear, 4. run the
    compressed block where the next one sees what it makes, 5. store."""
    held = calibrated(context, spec, workspace)
    context.calibrated = None
    clock = Clock(context.device, held.timing)
    held, codes = tuned(context, spec, held, workspace)
    weights = {name: held.loaded.parameters[f"{name}.weight"] for name in spec.recipe}
    linears, reports = compress(
        {name: weight.to(context.device) for name, weight in weights.items()},
        held.statistics,
        spec.recipe,
        scale_dtypes={name: scale_dtype(name, held.loaded.dtypes[f"{name}.weight"]) for name in weights},
        factor_dtypes={name: held.loaded.dtypes[f"{name}.weight"] for name in weights},
        outliers=held.outliers,
        codes=codes,
        pool=context.pool,
    )
    linears = {name: replace(linear, transform=held.loaded.online.get(name)) for name, linear in linears.items()}
    clock.lap("solve")
    outputs = propagate(context, spec, held.loaded.block, linears, held.outputs, workspace)
    clock.lap("forward")
    _, builder = context.source(spec.setting)
    record = write_block(
        spec,
        builder,
        held.loaded.parameters,
        held.loaded.dtypes,
        linears,
        reports,
        outputs,
        workspace,
        held.timing,
    )
    clock.lap("write")
    record = record.model_copy(update={"timing": clock.timing()})
    del held, linears
    release(context.device)
    return record


def branch_gains(
    context: TaskContext, spec: BlockSpec, workspace: Workspace
) -> tuple[dict[str, tuple[float, ...]], tuple[Blob, ...]]:
    """Linear -> what each further rank of its branch would take off its relative error; and the original block's outputs."""
    held = calibrated(context, spec, workspace)
    found: dict[str, tuple[float, ...]] = {}
    for group, statistics in held.statistics.items():
        for name in group:
            part = spec.recipe.get(name)
            if part is None or part.compensation.branch_rank is None:
                continue
            (own,) = gains(
                part,
                [held.loaded.parameters[f"{name}.weight"].float().to(context.device)],
                statistics,
                held.outliers.get(group),
                scale_dtype=scale_dtype(name, held.loaded.dtypes[f"{name}.weight"]),
            )
            found[name] = tuple(own.tolist())
    return found, held.outputs


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
            weights=part.weights.grid(),
            scale_dtype=scale_dtype(name, loaded.dtypes[f"{name}.weight"]),
            activations=held.statistics[groups[name]].activations,
        )
        for name, part in spec.recipe.items()
        if isinstance(part.weights, Weights)  # which a recipe with tuning asks for
    }
    targets = [loaded.block.run(load()) for load in originals or inputs]
    found = tune(loaded.block, [load() for load in inputs], targets, formats, options)
    if not found.norms:
        return held, dict(found.weights)
    builder = context.source(spec.setting)[1]
    family = family_of(builder.config.model_type)
    scales = {}
    for group in loaded.block.groups:
        norm = f"{family.norm_before(group[0])}.weight"
        if norm in found.norms:
            before, after = (
                value.float() + family.norm_offset for value in (loaded.parameters[norm], found.norms[norm])
            )
            scales[group] = before / after
    parameters = fold(family, scales, loaded.parameters, loaded.online, heads=loaded.block.heads)
    block = run_block(context, builder, spec.index, parameters, loaded.online, DTYPES[spec.setting.compute_dtype])
    gatherings = {group: statistics.gathering for group, statistics in held.statistics.items()}
    statistics, _ = calibrate(block, inputs, lambda _: None, gatherings, context.pool, originals)
    loaded = replace(loaded, parameters=parameters, block=block)
    return replace(held, loaded=loaded, statistics=statistics), dict(found.weights)


def propagate(
    context: TaskContext,
    spec: BlockSpec,
    block: Block,
    linears: Mapping[str, CompressedLinear],
    originals: tuple[Blob, ...],
    workspace: Workspace,
) -> tuple[Blob, ...]:
    """Hidden states behind the compressed block, then `originals`; none where blocks see the original's."""
    if spec.propagate == "original":
        return ()
    install(block, linears)
    inputs, _ = streams(context, spec, workspace)
    emitted = context.pool.map(lambda load: put_hidden(workspace, block.run(load())), inputs)
    return (*emitted, *originals)
