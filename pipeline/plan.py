"""What a job will do and need, from headers and the manifest alone; no tensor is read.

Sizes are estimates with the same shape as the truth: every term is named, and the plan says which is largest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod

from counterweight.pipeline.devices import memory_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.residual_tuner import afford
from counterweight.workers.config import Config
from counterweight.workers.errors import ManifestError
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.models.layout import EMBEDDING, LM_HEAD, NORM
from counterweight.workers.recipe import ModuleRecipe, Recipe
from counterweight.workers.tasks.setting import ITEMSIZE, shard_sequences

PROCESS_BYTES = 600 << 20
"""A worker process with torch, transformers and Ray imported, before its first task (measured: 480-560 MiB)."""


class BlockPlan(Config):
    """One block task. linears: full name as stored -> [out, in]; recipe: name in the block -> what applies."""

    index: int
    parameters: int
    source_bytes: int
    linears: Mapping[str, tuple[int, int]]
    recipe: Mapping[str, ModuleRecipe]
    statistics_bytes: int
    activation_bytes: int
    solve_bytes: int
    peak_bytes: int
    calibrated_bytes: int
    """What calibration leaves in memory: weights, as they were read and as they run, and the sums of the statistics."""
    forward_flops: int
    statistics_flops: int


class Plan(Config):
    """A whole job.

    quantized, kept: parameters. tokens: of calibration. storage_*_bytes: traffic with the object store.
    """

    name: str
    model: str
    model_type: str
    parameters: int
    quantized: int
    source_bytes: int
    tokens: int
    blocks: tuple[BlockPlan, ...]
    peak_bytes_per_worker: int
    storage_read_bytes: int
    storage_written_bytes: int
    flops: int
    header_bytes_read: int
    device: str | None
    """The GPU that it was asked about; null: none."""
    problems: tuple[str, ...]


def block_recipe(source: ModelSource, index: int, recipe: Recipe) -> dict[str, ModuleRecipe]:
    """Linear (name in the block) -> what applies to it; kept linears are absent.

    Patterns of the recipe are matched against the name as the artifact stores it. Latency budgets are resolved here, budgets
    of bits by `allocation`, which has to look at the weights.
    """
    layout = source.layout
    result: dict[str, ModuleRecipe] = {}
    for group in layout.block_linears(index):
        for name in group:
            part = recipe.for_module(_stored(source, index, name))
            if part is not None:
                result[name] = part
    shapes = layout.block_parameters(index)
    return afford(result, {name: _matrix(shapes[f"{name}.weight"]) for name in result})


def make_plan(job: CompressionJob, source: ModelSource, device: str | None = None) -> Plan:
    """The plan of a job. device: a name of `devices.MEMORY`, RequestError for another. ManifestError for what the recipe asks
    and the model cannot give (a rank above a layer's size, a group size that does not divide a width, an override that matches
    nothing)."""
    _check_overrides(job.spec.recipe, source)
    _check_rotation(job.spec.recipe, source)
    blocks = tuple(_block_plan(job, source, index) for index in range(source.layout.blocks))
    calibration = job.spec.calibration
    tokens = calibration.sequences * calibration.sequence_length
    boundary = tokens * source.layout.hidden_size * ITEMSIZE[calibration.compute_dtype]
    total = sum(_bytes(source, name) for name in source.tensors)
    validation = 0 if job.spec.validation is None else 2
    written = _artifact_bytes(source, blocks) + boundary * (len(blocks) + 1)
    held = _held_bytes(job, blocks)
    peak = max(block.peak_bytes for block in blocks) + held
    return Plan(
        name=job.metadata.name,
        model=source.uri,
        model_type=str(source.checkpoint.config["model_type"]),
        parameters=source.parameters,
        quantized=sum(prod(block.linears[_full(source, block, n)]) for block in blocks for n in block.recipe),
        source_bytes=total,
        tokens=tokens,
        blocks=blocks,
        peak_bytes_per_worker=PROCESS_BYTES + peak,
        storage_read_bytes=total * (2 + validation) + boundary * len(blocks),
        storage_written_bytes=written,
        flops=sum(block.forward_flops + block.statistics_flops for block in blocks),
        header_bytes_read=source.checkpoint.bytes_read,
        device=device,
        problems=tuple(_misfits(job, blocks, held, device)),
    )


def _held_bytes(job: CompressionJob, blocks: Sequence[BlockPlan]) -> int:
    """What a worker keeps at most, beside the block that it works on, of blocks that wait for a budget to be shared out."""
    if job.spec.calibration.propagate != "original":
        return 0
    sharing = [block for block in blocks if any(part.budget_bits is not None for part in block.recipe.values())]
    return min(HOLD_BYTES, sum(block.calibrated_bytes for block in sharing))


def _block_plan(job: CompressionJob, source: ModelSource, index: int) -> BlockPlan:
    calibration = job.spec.calibration
    layout = source.layout
    shapes = layout.block_parameters(index)
    groups = layout.block_linears(index)
    recipe = block_recipe(source, index, job.spec.recipe)
    linears = {name: _matrix(shapes[f"{name}.weight"]) for group in groups for name in group}
    _check_recipe(source, index, recipe, linears, calibration.propagate)
    itemsize = ITEMSIZE[calibration.compute_dtype]
    names = source.block_tensors(index)
    entries = [source.checkpoint.entry(name) for name in names]
    loaded = sum(
        prod(entry.shape) * entry.dtype.itemsize for entry in entries
    )  # block-scaled weights take more than stored
    parameters = sum(prod(shape) for shape in shapes.values())
    widths = [linears[group[0]][1] for group in groups if any(name in recipe for name in group)]
    quantized_inputs = any(part.activations is not None for part in recipe.values())
    paired = calibration.propagate == "compressed" and any(part.regresses for part in recipe.values())
    streams = 1 + quantized_inputs + paired
    products = streams * (streams + 1) // 2
    # The running sum and one shard's product per thread, for each distinct input and each pair of its streams.
    statistics = sum(width * width * (8 + 4) * products for width in widths)
    shard = shard_sequences(calibration.sequence_length) * calibration.sequence_length
    intermediate = max((rows for rows, _ in linears.values()), default=0)
    activations = shard * itemsize * (layout.hidden_size * 6 + intermediate * 3)
    largest = max(widths, default=0)
    # float64 Hessian, its factor and its inverse, and float32 copies of the widest layer.
    solve = largest * largest * 8 * 3 + max((rows * columns for rows, columns in linears.values()), default=0) * 16
    tokens = calibration.sequences * calibration.sequence_length
    active = {name: layout.family.active_share(source.checkpoint.config, layout.experts, name) for name in linears}
    return BlockPlan(
        index=index,
        parameters=parameters,
        source_bytes=sum(entry.length for entry in entries),
        linears={_stored(source, index, name): shape for name, shape in linears.items()},
        recipe=recipe,
        statistics_bytes=statistics,
        activation_bytes=activations,
        solve_bytes=solve,
        peak_bytes=loaded + parameters * itemsize + statistics + max(activations, solve),
        calibrated_bytes=loaded + parameters * itemsize + statistics * 8 // (8 + 4),
        forward_flops=int(2 * tokens * sum(prod(shape) * active[name] for name, shape in linears.items())),
        statistics_flops=int(
            sum(
                tokens * active[group[0]] * linears[group[0]][1] ** 2 * products
                for group in groups
                if any(name in recipe for name in group)
            )
        ),
    )


def _check_recipe(
    source: ModelSource,
    index: int,
    recipe: Mapping[str, ModuleRecipe],
    linears: Mapping[str, tuple[int, int]],
    propagate: str,
) -> None:
    problems: list[str] = []
    for name, part in recipe.items():
        rows, columns = linears[name]
        where = _stored(source, index, name)
        if (problem := part.weights.problem(rows, columns)) is not None:
            problems.append(f"spec.recipe.weights.{problem} of {where}")
        tiles = None if part.activations is None else part.activations.group_size
        if tiles is not None and columns % tiles:
            problems.append(
                f"spec.recipe.activations.group_size: {tiles}: expected a divisor of {columns}, the input of {where}"
            )
        idle = part.activations is None and propagate == "original"
        if part.weights.regresses is not None and idle:
            problems.append(
                f"spec.recipe.weights.{part.weights.regresses}: expected plain, which is the same here: without quantized "
                "activations and with calibration.propagate original, codes see the original's input"
            )
        problem = part.compensation.problem(rows, columns)
        if problem is not None:
            problems.append(f"spec.recipe.compensation: {where} [{rows}, {columns}]: {problem}")
    if problems:
        raise ManifestError("\n".join(problems[:20]))


def _check_rotation(recipe: Recipe, source: ModelSource) -> None:
    if recipe.rotation is None:
        return
    layout = source.layout
    problem = recipe.rotation.problem(layout.family, layout.model_type)
    if problem is not None:
        raise ManifestError(f"spec.recipe.transforms: {problem}")


def _check_overrides(recipe: Recipe, source: ModelSource) -> None:
    """A pattern that matches no module would do nothing: an error, not a log line."""
    from fnmatch import fnmatchcase

    names = {
        _stored(source, index, name)
        for index in range(source.layout.blocks)
        for group in source.layout.block_linears(index)
        for name in group
    } | {"lm_head"}
    patterns = [(f"spec.recipe.overrides.{i}.match", item.match) for i, item in enumerate(recipe.overrides)]
    patterns += [(f"spec.recipe.keep.{i}", pattern) for i, pattern in enumerate(recipe.keep)]
    idle = [
        f"{field}: {pattern!r}: matches no linear layer of the model, expected a glob such as '*.mlp.down_proj'"
        for field, pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if idle:
        raise ManifestError("\n".join(idle))


def _misfits(job: CompressionJob, blocks: Sequence[BlockPlan], held: int, device: str | None) -> list[str]:
    """What does not fit this machine, for workers without GPUs, or the device that is named. held: see `_held_bytes`."""
    largest = max(blocks, key=lambda block: block.peak_bytes)
    resources = job.spec.resources
    if device is not None:
        available = int(memory_of(device) * min(1.0, resources.gpus_per_worker or 1.0))
        need = largest.peak_bytes + held
        what = f"block {largest.index} needs {_gib(need)} of a GPU: a worker has {_gib(available)} of {device}"
    elif resources.gpus_per_worker == 0:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        each = PROCESS_BYTES + largest.peak_bytes + held
        need = each * resources.workers
        what = f"{resources.workers} workers of {_gib(each)} need {_gib(need)}: this machine has {_gib(available)}"
    else:
        return []  # nothing is known of a GPU that nobody names
    return [what] if need > available else []


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _artifact_bytes(source: ModelSource, blocks: tuple[BlockPlan, ...]) -> int:
    outside = [name for name in (EMBEDDING, NORM, LM_HEAD) if name in source.tensors]
    total = sum(_bytes(source, name) for name in outside)
    for block in blocks:
        quantized = 0
        for name, part in block.recipe.items():
            rows, columns = block.linears[_full(source, block, name)]
            quantized += rows * columns
            total += part.weights.stored_bits(rows, columns) // 8
        total += (block.parameters - quantized) * 2
    return total


def _full(source: ModelSource, block: BlockPlan, name: str) -> str:
    return _stored(source, block.index, name)


def _stored(source: ModelSource, index: int, name: str) -> str:
    return source.layout.module_name(index, name)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return (rows, columns)


def _bytes(source: ModelSource, name: str) -> int:
    return source.checkpoint.entry(name).length
