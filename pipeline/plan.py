"""What a job will do and need, from headers and the manifest alone; no tensor is read.

Sizes are estimates with the same shape as the truth: every term is named, and the plan says which is largest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from counterweight.pipeline.devices import memory_of
from counterweight.pipeline.loads import load_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.resolve import block_recipe, check_block, check_recipe, linears_of, stored_name
from counterweight.workers.arithmetic import arithmetic
from counterweight.workers.arithmetic.distillation import training_flops
from counterweight.workers.config import Config
from counterweight.workers.footprint import Load, footprint
from counterweight.workers.footprint.distillation import Texts, state_traffic, trained_parameters, training_bytes
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.models.layout import EMBEDDING, LM_HEAD, NORM
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.setting import ITEMSIZE

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
    prepare_flops: int
    """Of rotated weights, and of choices from the first shard."""
    forward_flops: int
    """Of all passes through the block but those of training."""
    statistics_flops: int
    tune_flops: int
    """Of training, 0 without it."""
    solve_flops: int
    """Of codes, branches, stores and errors; and of the gains that a budget is shared out by."""

    @property
    def phases(self) -> Mapping[str, int]:
        """Phase -> its floating-point operations."""
        return {
            "prepare": self.prepare_flops,
            "forward": self.forward_flops,
            "statistics": self.statistics_flops,
            "tune": self.tune_flops,
            "solve": self.solve_flops,
        }

    @property
    def flops(self) -> int:
        return sum(self.phases.values())


class DistillationPlan(Config):
    """The training of the compressed model. parameters: that are trained. replicas: how many workers can share it. peak_bytes:
    of each of them, where the arithmetic is done. flops, state_*_bytes: of all together, when every epoch is run."""

    parameters: int
    replicas: int = 1
    peak_bytes: int
    flops: int
    state_read_bytes: int = 0
    state_written_bytes: int = 0


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
    """What takes most: block and phase, or the distillation."""
    storage_read_bytes: int
    storage_written_bytes: int
    flops: int
    """Floating-point operations of all blocks' tasks and of the distillation; embedding and validation are left out."""
    distillation: DistillationPlan | None = None
    """Of training the compressed model as a whole."""
    header_bytes_read: int
    device: str | None
    """The GPU that it was asked about; null: none."""
    problems: tuple[str, ...]


def make_plan(job: CompressionJob, source: ModelSource, device: str | None = None) -> Plan:
    """The plan of a job. device: a name of `devices.MEMORY`, RequestError for another. ManifestError for what the recipe asks
    and the model cannot give (a rank above a layer's size, a group size that does not divide a width, an override that matches
    nothing)."""
    check_recipe(job.spec.recipe, source)
    blocks = tuple(_block_plans(job, source))
    calibration = job.spec.calibration
    tokens = calibration.sequences * calibration.sequence_length
    boundary = tokens * source.layout.hidden_size * ITEMSIZE[calibration.compute_dtype]
    total = sum(_bytes(source, name) for name in source.tensors)
    validation = 0 if job.spec.validation is None else 2
    written = _artifact_bytes(source, blocks) + boundary * (len(blocks) + 1)
    held = _held_bytes(job, blocks)
    largest = max(blocks, key=lambda block: block.peak_bytes)
    on_gpu = job.spec.resources.gpus_per_worker > 0
    most, where = largest.peak_bytes + held, f"block {largest.index}, {largest.peak_phase}"
    training = _distillation_plan(job, source)
    if training is not None and training.peak_bytes > most:
        most, where = training.peak_bytes, "distillation"
    peak = most + (0 if on_gpu else PROCESS_BYTES)
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
        largest=where,
        storage_read_bytes=total * (2 + validation)
        + boundary * len(blocks)
        + (0 if training is None else training.state_read_bytes),
        storage_written_bytes=written + (0 if training is None else training.state_written_bytes),
        flops=sum(block.flops for block in blocks) + (0 if training is None else training.flops),
        distillation=training,
        header_bytes_read=source.checkpoint.bytes_read,
        device=device,
        problems=tuple(_misfits(job, most, where, device)),
    )


def _held_bytes(job: CompressionJob, blocks: Sequence[BlockPlan]) -> int:
    """What a worker keeps at most, beside the block that it works on, of blocks that wait for a budget to be shared out."""
    if job.spec.calibration.propagate != "original":
        return 0
    sharing = [block for block in blocks if any(part.budget_bits is not None for part in block.recipe.values())]
    return min(HOLD_BYTES, sum(block.calibrated_bytes for block in sharing))


def _distillation_plan(job: CompressionJob, source: ModelSource) -> DistillationPlan | None:
    stage = job.spec.distillation
    if stage is None:
        return None
    texts = Texts(
        trained=stage.trained,
        held_out=sum(share.sequences for share in stage.held_out),
        length=job.spec.calibration.sequence_length,
    )
    loads = [
        load_of(job, source, index, block_recipe(source, index, job.spec.recipe))
        for index in range(source.layout.blocks)
    ]
    parameters = sum(trained_parameters(load, stage.training) for load in loads)
    read, written = state_traffic(parameters, stage.training)
    return DistillationPlan(
        parameters=parameters,
        replicas=stage.training.replicas,
        peak_bytes=training_bytes(loads, stage.training, texts, source.layout.vocabulary),
        flops=training_flops(loads, stage.training, texts, source.layout.vocabulary),
        state_read_bytes=read,
        state_written_bytes=written,
    )


def _block_plans(job: CompressionJob, source: ModelSource) -> Iterator[BlockPlan]:
    """Of all blocks; of neighbours that are alike, the costs are worked out once."""
    before: Load | None = None
    for index in range(source.layout.blocks):
        recipe = block_recipe(source, index, job.spec.recipe)
        check_block(source, index, recipe, job.spec.calibration.propagate)
        load = load_of(job, source, index, recipe)
        if load != before:
            before, found, computed = load, footprint(load), arithmetic(load)
        yield BlockPlan(
            index=index,
            parameters=load.parameters,
            source_bytes=sum(_bytes(source, name) for name in source.block_tensors(index)),
            linears={stored_name(source, index, name): shape for name, shape in linears_of(source, index).items()},
            recipe=recipe,
            statistics_bytes=found.statistics,
            activation_bytes=found.activations,
            solve_bytes=found.solve,
            peak_bytes=found.peak,
            peak_phase=found.largest,
            host_bytes=found.host,
            calibrated_bytes=found.weights + found.statistics,
            prepare_flops=computed.prepare.total,
            forward_flops=computed.forward.total,
            statistics_flops=computed.statistics.total,
            tune_flops=computed.tune.total,
            solve_flops=computed.solve.total,
        )


def _misfits(job: CompressionJob, need: int, where: str, device: str | None) -> list[str]:
    """What does not fit this machine, for workers without GPUs, or the device that is named. need: bytes of a worker at the
    peak, where: when that is."""
    resources = job.spec.resources
    if device is not None:
        available = int(memory_of(device) * min(1.0, resources.gpus_per_worker or 1.0))
        what = f"{where.partition(',')[0]} needs {_gib(need)} of a GPU: a worker has {_gib(available)} of {device}"
    elif resources.gpus_per_worker == 0:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        each = PROCESS_BYTES + need
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
