"""A block that has run over its calibration tokens: what solving needs to know of it, and what branches could win in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from counterweight.workers.block import calibrate
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.clock import Clock
from counterweight.workers.context import DTYPES, TaskContext, put_hidden
from counterweight.workers.interchange.compressed_tensors import scale_dtype
from counterweight.workers.loaded_block import LoadedBlock, load_block, smoothed
from counterweight.workers.memory import release, trim
from counterweight.workers.models.families import family_of
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.prepare import prepare
from counterweight.workers.solve import LayerState, gains
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.records import Timing
from counterweight.workers.workspace import Blob, Workspace


@dataclass(frozen=True, slots=True)
class CalibratedBlock:
    """What calibration found, kept for solving. key: `BlockSpec.statistics_key`. outliers: linear -> channels of its
    input that ASER takes out of the codes. outputs: hidden states behind the original block, none where nobody needs them."""

    key: str
    loaded: LoadedBlock
    outliers: Mapping[str, Tensor]
    statistics: dict[SharedInputGroup, InputStatistics]
    outputs: tuple[Blob, ...]
    timing: Timing

    @property
    def bytes(self) -> int:
        """Memory that it takes, on host and device together."""
        return self.loaded.bytes + sum(found.bytes for found in self.statistics.values())


Load = Callable[[], Tensor]
"""Reads one shard of hidden states."""


def streams(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> tuple[list[Load], list[Load]]:
    """Loaders of the shards that enter the block, and of those that enter it in the original model where they differ."""

    def loader(blob: Blob) -> Load:
        return lambda: workspace.get_tensors(blob)["hidden"].to(context.device)

    return [loader(blob) for blob in spec.inputs], [loader(blob) for blob in spec.original_inputs]


def calibrated(context: TaskContext, spec: BlockSpec, workspace: Workspace) -> CalibratedBlock:
    """The block's calibration: what is in memory, which is held no longer, or made now.

    1. Read the block and verify every byte. 2. Decide from the first shard what needs rows of inputs and not moments: scales,
    outliers, clips. 3. Run the original block, store its outputs, gather the statistics; of the scaled block where there are
    scales.
    """
    key = spec.statistics_key()
    held = context.held.take(key)
    if held is not None:
        return held
    context.held.make_room()
    release(context.device)
    clock = Clock(context.device)
    dtype = DTYPES[spec.setting.compute_dtype]
    loaded = load_block(context, spec.setting, spec.index, spec.tensors, dtype)
    clock.lap("load")
    keep_outputs = spec.propagate == "original" or bool(spec.original_inputs)

    def emit(output: Tensor) -> Blob | None:
        return put_hidden(workspace, output) if keep_outputs else None

    inputs, originals = streams(context, spec, workspace)
    builder = context.source(spec.setting)[1]
    family = family_of(builder.config.model_type)
    chosen = prepare(loaded.block, spec.recipe, loaded.parameters, family, loaded.online, inputs[0])
    if chosen.scales:
        # What the original block makes is shared between recipes, so it comes from the block as it was.
        shards = (originals or inputs) if keep_outputs else []
        _, outputs = calibrate(loaded.block, shards, emit, {}, context.pool)
        loaded = smoothed(context, builder, spec.index, loaded, chosen.scales, dtype)
        statistics, _ = calibrate(loaded.block, inputs, lambda _: None, chosen.gatherings, context.pool, originals)
    else:
        statistics, outputs = calibrate(loaded.block, inputs, emit, chosen.gatherings, context.pool, originals)
    clock.lap("forward")
    trim()
    return CalibratedBlock(
        key=key,
        loaded=loaded,
        statistics=statistics,
        outliers=chosen.outliers,
        outputs=tuple(blob for blob in outputs if blob is not None),
        timing=clock.timing(),
    )


def branch_gains(context: TaskContext, spec: BlockSpec, held: CalibratedBlock) -> dict[str, tuple[float, ...]]:
    """Linear -> what each further rank of its branch would take off its relative error."""
    found: dict[str, tuple[float, ...]] = {}
    for group, statistics in held.statistics.items():
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
