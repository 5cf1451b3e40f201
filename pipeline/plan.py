"""What a job will do and need, from headers and the manifest alone; no tensor is read.

Sizes are estimates with the same shape as the truth: every term is named, and the plan says which is largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from counterweight.pipeline.estimate import (
    Costs,
    Estimate,
    SharedSeconds,
    again,
    block_seconds,
    estimate,
    judged,
    reference_bytes,
    validation_bytes,
)
from counterweight.pipeline.estimate.asked import Asked, asked
from counterweight.pipeline.hidden_states import HiddenStatesPlan, away, hidden_states, reserved
from counterweight.pipeline.loads import load_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.memory import PROCESS_BYTES, Memory, host_bytes, misfits, worker_memory
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.rates import MEASURED, UNMEASURED, Rates, rates_of
from counterweight.pipeline.resolve import (
    block_recipe,
    check_block,
    check_drawn,
    check_gates_apply,
    check_recipe,
    linears_of,
    stored_name,
)
from counterweight.pipeline.shared_blocks import balanced, last_parts, sharing
from counterweight.pipeline.sizes import kept_bytes, quantized_bytes, quantized_parameters
from counterweight.pipeline.units import bytes_text
from counterweight.workers.arithmetic import Arithmetic, arithmetic
from counterweight.workers.arithmetic.distillation import training_flops
from counterweight.workers.arithmetic.units import Unit, units
from counterweight.workers.config import Config
from counterweight.workers.dtypes import ITEMSIZE
from counterweight.workers.footprint import Load, footprint
from counterweight.workers.footprint.distillation import Texts, state_traffic, trained_parameters, training_bytes
from counterweight.workers.footprint.division import fitted
from counterweight.workers.footprint.whole import BATCH, whole_bytes
from counterweight.workers.harness import Documents
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.recipe import ModuleRecipe


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
    kept_peak_bytes: int
    """`peak_bytes` where these sums stay, for the blocks of other jobs of a sweep to be solved with them too."""
    passes: tuple[tuple[str, ...], ...]
    """Linears that are solved after each pass over the calibration tokens; empty: all after one."""
    batch_bytes: int
    """That solves of one shape may take together."""
    undivided_bytes: int
    """`peak_bytes` if all were solved after one."""
    prepare_flops: int
    """Of rotated weights, and of choices from the first shard."""
    forward_flops: int
    """Of all passes through the block but those of training."""
    statistics_flops: int
    tune_flops: int
    """Of training, 0 without it."""
    solve_flops: int
    """Of codes, branches, stores and errors; and of the gains that a budget is shared out by."""
    units: tuple[Unit, ...] = ()
    """By which workers may share the block; none where each has blocks of its own, but for the last."""

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
    drawn_tokens: int = 0
    """Further ones, for experts that see too few of these."""
    blocks: tuple[BlockPlan, ...]
    peak_bytes_per_worker: int
    """Where the arithmetic is done: on the host, its process included, or on a GPU."""
    host_bytes_per_worker: int
    """On the host, the process included."""
    largest: str
    """What takes most: block and phase, the distillation, or the validation where it runs a model as a whole."""
    artifact_bytes: int = 0
    """Of the artifact's weights, branches, stores and kept tensors, with `source_bytes` beside it."""
    bits_per_weight: float = 0.0
    """Of a quantized weight, all in, as the report counts them; of ranks by energy or budget at their most."""
    storage_read_bytes: int
    storage_written_bytes: int
    flops: int
    """Floating-point operations of all blocks' tasks and of the distillation; embedding and validation are left out."""
    divided: tuple[str, ...]
    """Blocks that are solved in several passes over the calibration tokens, and why."""
    distillation: DistillationPlan | None = None
    """Of training the compressed model as a whole."""
    hidden_states: HiddenStatesPlan
    header_bytes_read: int
    device: str | None
    """The GPU that it was asked about, or a file of measured rates; null: none."""
    estimate: Estimate | None = None
    """How long it takes; null where nothing is known of the device."""
    problems: tuple[str, ...]
    keeps_statistics: bool
    """Whether a worker can keep the statistics of a block that was solved, for the jobs of a sweep that need the same."""


def make_plan(
    job: CompressionJob,
    source: ModelSource,
    device: str | None = None,
    *,
    gpu_bytes: int = 0,
    rates: Rates | None = None,
    documents: Documents | None = None,
) -> Plan:
    """The plan of a job. device: a name of `devices.MEMORY` or a file of rates, RequestError for another. gpu_bytes: memory of
    the GPU that workers have, for which blocks are divided where none is named; 0: not known. rates: of the workers, where no
    device is named. documents: tasks that models are asked; None: none are timed. ManifestError for what the recipe asks and
    the model cannot give (a rank above a layer's size, a group size that does not divide a width, an override that matches
    nothing)."""
    check_recipe(job.spec.recipe, source)
    check_gates_apply(job.spec.validation, source)
    gpu = None if device is None or device.endswith(MEASURED) else device
    memory = worker_memory(job, gpu, gpu_bytes)
    resolved = tuple(_resolved(job, source))
    check_drawn(job.spec.calibration, source, [block.recipe for block in resolved])
    on_gpu = job.spec.resources.gpus_per_worker > 0
    calibration = job.spec.calibration
    tokens, drawn, unseen = (
        count * calibration.sequence_length
        for count in (calibration.sequences, calibration.drawn, calibration.held_out_sequences)
    )
    boundary = (tokens + drawn + unseen) * source.layout.hidden_size * ITEMSIZE[calibration.compute_dtype]
    held = _held_bytes(job, resolved) + (0 if on_gpu else reserved(job, boundary))
    costed = tuple(_costed(source, resolved, None if memory is None else memory.bytes - held))
    blocks = tuple(block.plan for block in costed)
    total = sum(_bytes(source, name) for name in source.tensors)
    loads = [block.load for block in costed]
    stored = quantized_bytes(loads)
    quantized = quantized_parameters(loads)
    artifact = stored + kept_bytes(source, sum(block.parameters for block in blocks) - quantized)
    passed = sum(load.passed for load in loads)
    largest = max(blocks, key=lambda block: block.peak_bytes)
    passes = f" in {len(largest.passes)} passes over the tokens" if len(largest.passes) > 1 else ""
    most, where = largest.peak_bytes + held, f"block {largest.index}{passes}, {largest.peak_phase}"
    training = _distillation_plan(job, source, loads)
    if training is not None and training.peak_bytes > most:
        most, where = training.peak_bytes, "distillation"
    if (whole := _whole_bytes(job, source)) > most:
        most, where = whole, "validation, a model as a whole"
    states_read, states_written = (
        (0, 0) if training is None else (training.state_read_bytes, training.state_written_bytes)
    )
    reference = reference_bytes(job, source.layout.hidden_size)
    shared_read, shared_written = _shared_bytes(job, costed, boundary)
    host = PROCESS_BYTES + (max(block.host_bytes for block in blocks) if on_gpu else most)
    room = _room(job, gpu, memory, host, blocks)
    hidden = hidden_states(job, boundary, len(blocks) + passed, room)
    if not on_gpu and job.spec.resources.workers == 1 and job.spec.resources.hidden_states.durable_every is None:
        hidden = hidden.sparing(partial(again, _costs(job, source, costed, training, UNMEASURED, hidden, None).blocks))
    host += hidden.memory_bytes if on_gpu else hidden.memory_bytes - reserved(job, boundary)
    peak = most if on_gpu else host
    timed = device is None or on_gpu == (gpu is not None)
    rates = rates if device is None else rates_of(device)
    made: Estimate | None = None
    if rates is not None and timed:
        asking = None if documents is None else asked(documents.tasks.values())
        of_one = costs = _costs(job, source, costed, training, rates, hidden, asking)
        if job.spec.resources.workers > 1:
            alone = _with_one_worker(job)
            alone_hidden = hidden_states(alone, boundary, len(blocks) + passed, room)
            alone_hidden = alone_hidden.model_copy(update={"durable_every": hidden.durable_every})
            of_one = _costs(alone, source, costed, training, rates, alone_hidden, asking)
        made = estimate(costs, of_one, job.spec.resources, costed[0].load.threads)
        hidden = hidden.model_copy(update={"lost_seconds": again(costs.blocks, hidden.lost_blocks)})
    return Plan(
        name=job.metadata.name,
        model=source.uri,
        model_type=str(source.checkpoint.config["model_type"]),
        parameters=source.parameters,
        quantized=quantized,
        source_bytes=total,
        tokens=tokens,
        drawn_tokens=drawn,
        blocks=blocks,
        peak_bytes_per_worker=peak,
        host_bytes_per_worker=host,
        largest=where,
        artifact_bytes=artifact,
        bits_per_weight=8 * stored / max(quantized, 1),
        # The source by inventory and blocks, what was written by its check, and both again by the validation.
        storage_read_bytes=total * 2
        + hidden.read_bytes
        + shared_read
        + sum(block.source_bytes for block in blocks[:passed])
        + artifact
        + validation_bytes(job, total, artifact)
        + reference
        + states_read,
        storage_written_bytes=2 * artifact + hidden.written_bytes + shared_written + reference + states_written,
        flops=sum(block.flops for block in blocks) + (0 if training is None else training.flops),
        distillation=training,
        header_bytes_read=source.checkpoint.bytes_read,
        device=device,
        hidden_states=hidden,
        estimate=made,
        divided=tuple(_divisions(blocks, memory)),
        problems=tuple(misfits(job, most, where, gpu, memory)),
        keeps_statistics=all(len(block.passes) <= 1 for block in blocks)
        and (memory is None or max(block.kept_peak_bytes for block in blocks) <= memory.bytes),
    )


def _room(
    job: CompressionJob, gpu: str | None, memory: Memory | None, host: int, blocks: Sequence[BlockPlan]
) -> int | None:
    """Bytes that a worker's host has for hidden states beside its tasks, which take `host`; None where the machine is not
    known."""
    if job.spec.resources.gpus_per_worker > 0:
        machine, busy = host_bytes(job, gpu), host
    else:
        machine = host_bytes(job, gpu) if memory is None else memory.bytes + PROCESS_BYTES
        # Beside the statistics of a block that stay, for the jobs of a sweep that need the same.
        busy = max(host, PROCESS_BYTES + max(block.kept_peak_bytes for block in blocks))
    return None if machine is None else machine - busy


def _with_one_worker(job: CompressionJob) -> CompressionJob:
    resources = job.spec.resources.model_copy(update={"workers": 1})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"resources": resources})})


def _costs(
    job: CompressionJob,
    source: ModelSource,
    blocks: Sequence[_Costed],
    training: DistillationPlan | None,
    rates: Rates,
    hidden: HiddenStatesPlan,
    asking: Asked | None,
) -> Costs:
    """What the job's tasks take at these rates; blocks that are alike are priced once."""
    kinds = [(id(block.load), hidden.written(place)) for place, block in enumerate(blocks)]
    alike = dict(zip(kinds, blocks, strict=True))
    prices = {
        kind: block_seconds(
            block.load, block.arithmetic, rates, judged=judged(job), kept=hidden.kept, written=kind[1], away=away(job)
        )
        for kind, block in alike.items()
    }
    shared = {
        kind: SharedSeconds(
            load=block.load,
            rates=rates,
            stored=prices[kind].stored,
            kept=hidden.kept,
            written=kind[1],
            away=away(job),
        )
        for kind, block in alike.items()
    }
    return Costs(
        job=job,
        source=source,
        rates=rates,
        recipes=[block.plan.recipe for block in blocks],
        blocks=[prices[kind] for kind in kinds],
        units=[block.plan.units for block in blocks],
        shared=[shared[kind] for kind in kinds],
        calibrated=[block.plan.calibrated_bytes for block in blocks],
        distillation=[]
        if training is None
        else [training.flops / training.replicas / rates.products32] * training.replicas,
        asked=asking,
    )


def _shared_bytes(job: CompressionJob, blocks: Sequence[_Costed], boundary: int) -> tuple[int, int]:
    """What workers read and write beyond one of them, of blocks that they share: each its own copy of the block and of what
    enters it, and what others have solved. boundary: bytes of hidden states behind a block."""
    resources, calibration = job.spec.resources, job.spec.calibration
    if calibration.propagated == "original":
        parts = len(last_parts(blocks[-1].plan.units, resources.workers)) if len(blocks) > 1 else 0
        solved = quantized_bytes([blocks[-1].load]) if parts else 0
        return max(0, parts - 1) * (blocks[-1].plan.source_bytes + boundary) + solved, solved
    together = sharing(resources.workers, len(blocks), calibration.segment_blocks)
    read = written = 0
    for block in blocks:
        parts = len(balanced(block.plan.units, together)) if together > 1 else 0
        if parts:
            stretches = min(together, block.load.all_shards)
            solved = quantized_bytes([block.load])
            streams = 1 + block.load.paired
            read += (max(parts, stretches) - 1) * block.plan.source_bytes
            read += (streams * (parts + 1) - 1) * boundary + (stretches + 1) * solved
            written += (streams - 1) * boundary + solved
    return read, written


def _held_bytes(job: CompressionJob, blocks: Sequence[_Resolved]) -> int:
    """What a worker keeps at most, beside the block that it works on, of blocks that wait for a budget to be shared out."""
    if job.spec.calibration.propagated != "original":
        return 0
    sharing = [block for block in blocks if any(part.budget_bits is not None for part in block.recipe.values())]
    alike = {id(block.load): block.load for block in sharing}
    sizes = {key: footprint(load).calibrated for key, load in alike.items()}
    return min(HOLD_BYTES, sum(sizes[id(block.load)] for block in sharing))


def _distillation_plan(job: CompressionJob, source: ModelSource, loads: Sequence[Load]) -> DistillationPlan | None:
    stage = job.spec.distillation
    if stage is None:
        return None
    texts = Texts(
        trained=stage.trained,
        held_out=sum(share.sequences for share in stage.held_out),
        length=job.spec.calibration.sequence_length,
    )
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


def _whole_bytes(job: CompressionJob, source: ModelSource) -> int:
    """Of a worker that runs the original as a whole, which is the largest of the models; 0 where none is."""
    validation = job.spec.validation
    if validation is None or not validation.runs_whole:
        return 0
    layout, samples = source.layout, validation.generation
    written = 0 if samples is None else samples.prompts * (samples.prompt_tokens + samples.new_tokens)
    length = validation.sequence_length or job.spec.calibration.sequence_length
    asked = BATCH * length if validation.tasks else 0
    return whole_bytes(
        source.parameters,
        ITEMSIZE[validation.compute_dtype],
        tokens=max(written, asked),
        state=2 * layout.blocks * layout.hidden_size,  # keys and values are at most as wide as the stream
        scored=max(samples.prompts if samples is not None else 0, asked) * layout.vocabulary,
    )


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A block's recipe, and what its task works on: one object for neighbours that are alike."""

    index: int
    recipe: Mapping[str, ModuleRecipe]
    load: Load


@dataclass(frozen=True, slots=True)
class _Costed:
    """A block's plan and what it was made from."""

    plan: BlockPlan
    load: Load
    arithmetic: Arithmetic


def _resolved(job: CompressionJob, source: ModelSource) -> Iterator[_Resolved]:
    before: Load | None = None
    for index in range(source.layout.blocks):
        recipe = block_recipe(source, index, job.spec.recipe)
        check_block(source, index, recipe, job.spec.calibration.propagated)
        load = load_of(job, source, index, recipe)
        before = before if load == before else load
        yield _Resolved(index, recipe, before)


def _costed(source: ModelSource, blocks: Sequence[_Resolved], budget: int | None) -> Iterator[_Costed]:
    """Of all blocks. budget: bytes of a worker for a task, into which blocks are divided."""
    before: Load | None = None
    for block in blocks:
        load, index, recipe = block.load, block.index, block.recipe
        if load is not before:
            before, whole = load, footprint(load)
            done, found = (load, whole) if budget is None else fitted(load, budget)
            computed = arithmetic(done)
            shares = units(done) if done.compressed else ()
        if block is blocks[-1]:
            shares = units(done)
        plan = BlockPlan(
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
            calibrated_bytes=found.calibrated,
            kept_peak_bytes=found.kept_peak,
            passes=done.passes,
            batch_bytes=done.batch_bytes,
            undivided_bytes=whole.peak,
            prepare_flops=computed.prepare.total,
            forward_flops=computed.forward.total,
            statistics_flops=computed.statistics.total,
            tune_flops=computed.tune.total,
            solve_flops=computed.solve.total,
            units=shares,
        )
        yield _Costed(plan, done, computed)


def _bytes(source: ModelSource, name: str) -> int:
    return source.checkpoint.entry(name).length


def _divisions(blocks: Sequence[BlockPlan], memory: Memory | None) -> Iterator[str]:
    """Of blocks that are divided, those that are alike together."""
    for (passes, whole), alike in groupby(blocks, key=lambda block: (len(block.passes), block.undivided_bytes)):
        if passes > 1 and memory is not None:
            indices = [block.index for block in alike]
            name = f"block {indices[0]}" + (f" to {indices[-1]}" if len(indices) > 1 else "")
            yield f"{name}: {passes} passes over the tokens, because it needs {bytes_text(whole)} at once: {memory.whose}"
