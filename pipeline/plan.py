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
from counterweight.pipeline.pool import threads_per_worker
from counterweight.pipeline.resolve import block_recipe, check_block, check_recipe, linears_of, stored_name
from counterweight.workers.config import Config
from counterweight.workers.footprint import Group, Load, footprint, products_of
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.models.layout import EMBEDDING, LM_HEAD, NORM
from counterweight.workers.recipe import ModuleRecipe
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
    """Where the arithmetic is done: on the host, or on the device with GPUs."""
    peak_phase: str
    """When: load, prepare, forward, tune, solve, propagate or write."""
    host_bytes: int
    """On the host of a GPU, beside its process; 0 without GPUs."""
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
    """Where the arithmetic is done: on the host, its process included, or on a GPU."""
    host_bytes_per_worker: int
    """On the host, the process included."""
    largest: str
    """What takes most: block and phase."""
    storage_read_bytes: int
    storage_written_bytes: int
    flops: int
    header_bytes_read: int
    device: str | None
    """The GPU that it was asked about; null: none."""
    problems: tuple[str, ...]


def make_plan(job: CompressionJob, source: ModelSource, device: str | None = None) -> Plan:
    """The plan of a job. device: a name of `devices.MEMORY`, RequestError for another. ManifestError for what the recipe asks
    and the model cannot give (a rank above a layer's size, a group size that does not divide a width, an override that matches
    nothing)."""
    check_recipe(job.spec.recipe, source)
    blocks = tuple(_block_plan(job, source, index) for index in range(source.layout.blocks))
    calibration = job.spec.calibration
    tokens = calibration.sequences * calibration.sequence_length
    boundary = tokens * source.layout.hidden_size * ITEMSIZE[calibration.compute_dtype]
    total = sum(_bytes(source, name) for name in source.tensors)
    validation = 0 if job.spec.validation is None else 2
    written = _artifact_bytes(source, blocks) + boundary * (len(blocks) + 1)
    held = _held_bytes(job, blocks)
    largest = max(blocks, key=lambda block: block.peak_bytes)
    on_gpu = job.spec.resources.gpus_per_worker > 0
    peak = largest.peak_bytes + held + (0 if on_gpu else PROCESS_BYTES)
    host = PROCESS_BYTES + max(block.host_bytes for block in blocks) if on_gpu else peak
    return Plan(
        name=job.metadata.name,
        model=source.uri,
        model_type=str(source.checkpoint.config["model_type"]),
        parameters=source.parameters,
        quantized=sum(
            prod(block.linears[stored_name(source, block.index, n)]) for block in blocks for n in block.recipe
        ),
        source_bytes=total,
        tokens=tokens,
        blocks=blocks,
        peak_bytes_per_worker=peak,
        host_bytes_per_worker=host,
        largest=f"block {largest.index}, {largest.peak_phase}",
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
    linears = linears_of(source, index)
    check_block(source, index, recipe, calibration.propagate)
    active = {name: layout.family.active_share(source.checkpoint.config, layout.experts, name) for name in linears}
    together = [
        Group(
            linears={name: linears[name] for name in group},
            recipe={name: recipe[name] for name in group if name in recipe},
            share=active[group[0]],
        )
        for group in groups
    ]
    load = _load(job, source, index, together)
    found = footprint(load)
    names = source.block_tensors(index)
    parameters = sum(prod(shape) for shape in shapes.values())
    tokens = calibration.sequences * calibration.sequence_length
    return BlockPlan(
        index=index,
        parameters=parameters,
        source_bytes=sum(_bytes(source, name) for name in names),
        linears={stored_name(source, index, name): shape for name, shape in linears.items()},
        recipe=recipe,
        statistics_bytes=found.statistics,
        activation_bytes=found.activations,
        solve_bytes=found.solve,
        peak_bytes=found.peak,
        peak_phase=found.largest,
        host_bytes=found.host,
        calibrated_bytes=found.weights + found.statistics,
        forward_flops=int(2 * tokens * sum(prod(shape) * active[name] for name, shape in linears.items())),
        statistics_flops=int(
            sum(tokens * group.share * group.width**2 * products_of(load, group) for group in load.groups)
        ),
    )


def _load(job: CompressionJob, source: ModelSource, index: int, groups: Sequence[Group]) -> Load:
    """What a block's task works on, as `footprint` wants it."""
    calibration, resources, layout = job.spec.calibration, job.spec.resources, source.layout
    itemsize = ITEMSIZE[calibration.compute_dtype]
    together = min(calibration.sequences, shard_sequences(calibration.sequence_length))
    shard = together * calibration.sequence_length
    scores = 0
    if layout.family.eager_attention:
        # Scores, and the probabilities that are made of them in float32.
        heads = int(source.checkpoint.config["num_attention_heads"])
        scores = shard * calibration.sequence_length * heads * (itemsize + 4)
    compressed = calibration.propagate == "compressed"
    regresses = any(part.regresses for group in groups for part in group.recipe.values())
    threads = threads_per_worker(
        resources.cpus_per_worker, resources.workers, available=sorted(os.sched_getaffinity(0))
    )
    return Load(
        groups=groups,
        source_bytes=sum(_decoded_bytes(source, name) for name in source.block_tensors(index)),
        parameters=sum(prod(shape) for shape in layout.block_parameters(index).values()),
        compute=itemsize,
        hidden=layout.hidden_size,
        shard=shard,
        shards=-(-calibration.sequences // together),
        length=calibration.sequence_length,
        attention_bytes=scores,
        paired=compressed and regresses,
        compressed=compressed,
        rotation=job.spec.recipe.rotation,
        stretched=resources.workers > 1,
        threads=1 if resources.gpus_per_worker else threads,
        gpu=resources.gpus_per_worker > 0,
    )


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
            rows, columns = block.linears[stored_name(source, block.index, name)]
            quantized += rows * columns
            total += part.weights.stored_bits(rows, columns) // 8
        total += (block.parameters - quantized) * 2
    return total


def _bytes(source: ModelSource, name: str) -> int:
    return source.checkpoint.entry(name).length


def _decoded_bytes(source: ModelSource, name: str) -> int:
    """Of a tensor in memory; a block-scaled weight takes more than stored."""
    entry = source.checkpoint.entry(name)
    return prod(entry.shape) * entry.dtype.itemsize
