"""A job's stages on simulated workers, one after the other as the orchestrator runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from counterweight.pipeline.allocation import budgeted
from counterweight.pipeline.artifact.shards import begun_behind
from counterweight.pipeline.blocks import BlockNodes, BlockRecipe, Budget, stretches
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.estimate.asked import Asked
from counterweight.pipeline.estimate.costs import BlockSeconds
from counterweight.pipeline.estimate.pool import Simulated, SimulatedPool
from counterweight.pipeline.estimate.sharing import SharedSeconds
from counterweight.pipeline.graph import Graph, Node, giving
from counterweight.pipeline.hidden_states import on_a_node
from counterweight.pipeline.inventory import batches
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.neighbours import TASK_BYTES, neighbours
from counterweight.pipeline.policies import RetryPolicy
from counterweight.pipeline.rates import Rates
from counterweight.pipeline.shares import original_shares, originals_first, shares
from counterweight.workers.arithmetic.units import Unit
from counterweight.workers.dtypes import ITEMSIZE
from counterweight.workers.footprint.whole import BATCH
from counterweight.workers.matrix_flops import Work, elementwise, product
from counterweight.workers.parallel import BEHIND
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.setting import shard_sequences
from counterweight.workers.workspace import Blob

T = TypeVar("T")

WINDOWS = 160
"""Of a validation that names no number, as many as WikiText-2's test has of 2048 tokens: how long its text is, headers do not
tell."""

START = "start"
"""The stage before there are workers."""

JUDGED = 8
"""Operations on each logit of a window: its probability, and what is compared with the original's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a job's tasks take. distillation: seconds of the training for each replica, none without. calibrated: bytes of each
    block in a worker's memory. units, shared: of each block, what workers share it by, and the seconds of that; none where they
    do not. asked: by tasks of the harness, of each model; None without any."""

    job: CompressionJob
    source: ModelSource
    rates: Rates
    recipes: Sequence[BlockRecipe]
    blocks: Sequence[BlockSeconds]
    calibrated: Sequence[int]
    distillation: Sequence[float]
    units: Sequence[Sequence[Unit]] = ()
    shared: Sequence[SharedSeconds] = ()
    asked: Asked | None = None

    @property
    def judged(self) -> int:
        """Bytes of an activation in the validation."""
        return judged(self.job)

    @property
    def stored(self) -> int:
        """Bytes of the artifact's tensors."""
        return sum(block.stored for block in self.blocks) + sum(map(self.bytes_of, self.outside))

    @property
    def outside(self) -> tuple[str, ...]:
        """Tensors outside the blocks."""
        ends = self.source.layout.family.ends
        return tuple(name for name in self.source.tensors if name in ends or self.source.layout.is_beside(name))

    def bytes_of(self, name: str) -> int:
        """Of a source tensor."""
        return self.source.checkpoint.entry(name).length


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A whole job. stages: name -> seconds. idle: stage -> seconds of all workers without work. steps: name -> seconds of all
    workers."""

    stages: Mapping[str, float]
    idle: Mapping[str, float]
    steps: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def timeline(costs: Costs, workers: int, threads: int) -> Timeline:
    """The job on so many workers of so many threads."""
    sharing = budgeted(costs.recipes)
    kept = [bytes if sharing else 0 for bytes in costs.calibrated]
    on_gpu = costs.rates.link is not None
    pool = SimulatedPool(workers, threads, costs.blocks, costs.rates.task, kept, ahead=on_gpu, shared=costs.shared)
    dispatcher = Dispatcher(pool, RetryPolicy(), lambda _: None, Graph())
    stages, idle = {START: costs.rates.start}, {START: costs.rates.start * workers}
    validation = _validation(costs, workers)

    def stage(name: str, run: Callable[[], T]) -> T:
        clock, busy = pool.clock, sum(pool.steps.values())
        found = run()
        stages[name] = pool.clock - clock
        idle[name] = workers * stages[name] - (sum(pool.steps.values()) - busy)
        return found

    stage("inventory", lambda: dispatcher.run_all(_inventory(costs)))
    references, joined, shards = stage("blocks", lambda: _run_blocks(costs, dispatcher, threads))
    if costs.distillation:
        stage("distill", lambda: dispatcher.run_all(_replicas(costs)))
        joined, shards = _joined(costs, dispatcher.graph, (), workers), _shards(costs, dispatcher.graph)
    stage("assemble", lambda: _assemble(costs, dispatcher, joined, shards))
    if validation:
        nodes = [
            dispatcher.graph.add(giving(task), reads=(before,), after=(before,))
            for task, before in zip(validation, references, strict=True)
        ]
        stage("validate", lambda: dispatcher.run(nodes))
    if whole := [*_tasks(costs), *_samples(costs)]:
        stage("whole models", lambda: dispatcher.run_all(whole))
    return Timeline(stages=stages, idle=idle, steps=dict(pool.steps))


def _replicas(costs: Costs) -> list[Simulated]:
    """All that a replica computes as one task: rounds, at whose ends it waits for the others, take as long together."""
    return [
        Simulated(f"distillation, replica {place + 1}", {"distill": seconds})
        for place, seconds in enumerate(costs.distillation)
    ]


def _inventory(costs: Costs) -> list[Simulated]:
    parts = [sum(map(costs.bytes_of, names)) for names in batches(costs.source)]
    return [Simulated(f"inventory {place}", {"inventory": costs.rates.read(size)}) for place, size in enumerate(parts)]


def _run_blocks(
    costs: Costs, dispatcher: Dispatcher, threads: int
) -> tuple[list[Node[HiddenRecord]], list[Node[HiddenRecord]], list[Node[HiddenRecord]]]:
    """Runs the nodes that `stages.add_model`, `add_outside` and `add_references` add; gives the last, which may run on, and
    those of the artifact's joined file and shards, which do."""
    spec, rates, graph = costs.job.spec, costs.rates, dispatcher.graph
    calibration, propagate = spec.calibration, spec.calibration.propagated
    together = shard_sequences(calibration.sequence_length)
    kinds = (calibration.sequences, calibration.drawn, calibration.held_out_sequences)
    shards = sum(-(-kind // together) for kind in kinds)
    hidden = (
        sum(kinds) * calibration.sequence_length * costs.source.layout.hidden_size * ITEMSIZE[calibration.compute_dtype]
    )
    table = costs.bytes_of(costs.source.layout.names.embedding)
    parts = stretches(shards, len(costs.blocks), dispatcher.workers, threads, gpu=rates.link is not None)

    def embed(part: range) -> Simulated:
        made = hidden * len(part) / shards
        seconds = rates.read(table) + rates.moved(table + made) + _written(made, rates, threads)
        return Simulated(f"embedding of {part}", {"embed": seconds}, len(part))

    def spec_of(
        index: int,
        recipe: BlockRecipe,
        inputs: tuple[Blob, ...],
        original_inputs: tuple[Blob, ...],
        propagate: Literal["original", "compressed"],
    ) -> BlockSpec:
        return BlockSpec.model_construct(
            index=index, recipe=recipe, inputs=inputs, original_inputs=original_inputs, propagate=propagate
        )

    sharing = budgeted(costs.recipes)
    budget = Budget(blocks=sharing, share=lambda _: costs.recipes, bytes=costs.calibrated) if sharing else None
    nodes = BlockNodes(
        graph=graph,
        recipes=costs.recipes,
        spec_of=spec_of,
        propagate=propagate,
        budget=budget,
        stretches=parts,
        segment=calibration.segment_blocks,
        workers=dispatcher.workers,
        ahead=rates.link is not None,
        units=costs.units,
    )
    embedded = [graph.add(giving(embed(part))) for part in parts]
    if len(parts) > 1:
        graph.add(giving(Simulated("embedding, all shards", {})), after=embedded)
    blocks = nodes.add(embedded)
    kept = [Simulated(f"kept {name}", {"carry over": _carried(costs, name)}) for name in costs.outside]
    outside = [graph.add(giving(task)) for task in kept]
    references = _originals(costs, dispatcher)
    joined = [] if costs.distillation else _joined(costs, graph, blocks.compress, dispatcher.workers)
    copied = [] if costs.distillation else _shards(costs, graph, [*blocks.compress, *outside])
    dispatcher.run(blocks.compress)
    dispatcher.run(outside)
    return references, joined, copied


def _written(hidden: float, rates: Rates, threads: int) -> float:
    """Seconds for shards that one task writes: on a GPU behind what it computes, on a CPU side by side."""
    if rates.link is None:
        return rates.sent(hidden) / threads
    return max(hidden / rates.storage, rates.sent(hidden) / BEHIND)


def _carried(costs: Costs, name: str) -> float:
    size = costs.bytes_of(name)
    return costs.rates.read(size) + costs.rates.sent(size) + size / costs.rates.hash


def _shards(costs: Costs, graph: Graph, made: Sequence[Node[object]] = ()) -> list[Node[HiddenRecord]]:
    """As `artifact.shards.add_shards`; made: blocks, and what lies outside them."""
    rates = costs.rates
    sizes = [block.stored - block.branch for block in costs.blocks] + [costs.bytes_of(name) for name in costs.outside]
    nodes: list[Node[HiddenRecord]] = []
    for place, size in enumerate(sizes):
        copy = Simulated(f"copy {place}", {"copy": 2 * size / rates.storage})
        nodes.append(graph.add(giving(copy), after=made[place : place + 1]))
        check = Simulated(f"check {place}", {"check": rates.checked(size)})
        nodes.append(graph.add(giving(check), after=nodes[-1:]))
    return nodes


def _joined(costs: Costs, graph: Graph, blocks: Sequence[Node[object]], workers: int) -> list[Node[HiddenRecord]]:
    """As `artifact.shards.add_join`, where there are branches: one worker joins them, of which the next part is read beside."""
    rates, branches = costs.rates, [block.branch for block in costs.blocks]
    if not any(branches):
        return []
    coded = any(part.compensation.branch_bits for recipe in costs.recipes for part in recipe.values())
    # Names are sorted as text, behind their dtypes, of which codes and steps have two: there is nothing to begin with then.
    order = sorted(range(len(branches)), key=str)
    nodes: list[Node[HiddenRecord]] = []
    written = 0
    propagate = costs.job.spec.calibration.propagated
    for stop in [*begun_behind(len(blocks), workers, propagate), len(branches)]:
        missing = (place for place, index in enumerate(order) if index >= stop)
        end = len(branches) if stop == len(branches) else 0 if coded else next(missing)
        size = sum(branches[index] for index in order[written:end])
        join = rates.checked(size) + (rates.received(size) if rates.link is None else 0.0)
        task = Simulated(f"adapter, {stop} blocks", {"join": join})
        nodes.append(graph.add(giving(task), after=blocks[:stop], uses=nodes[-1] if nodes else None, bytes=1))
        written = end
    return nodes[-1:]


def _assemble(
    costs: Costs, dispatcher: Dispatcher, joined: Sequence[Node[HiddenRecord]], shards: Sequence[Node[HiddenRecord]]
) -> None:
    """Copies and checks what is left of `shards`, and what is `joined`."""
    graph = dispatcher.graph
    wanted = [*joined]
    for part in neighbours([block.branch for block in costs.blocks], TASK_BYTES) if joined else []:
        size = sum(costs.blocks[place].branch for place in part)
        check = Simulated(f"check of the adapter, {part}", {"check": costs.rates.read(size)})
        wanted.append(graph.add(giving(check), after=joined))
    dispatcher.run([*wanted, *shards])


def judged(job: CompressionJob) -> int:
    """Bytes of an activation in the validation; without one, as if it were in float32."""
    validation = job.spec.validation
    return ITEMSIZE["float32" if validation is None else validation.compute_dtype]


def windows_of_workers(job: CompressionJob, workers: int) -> list[range]:
    """Windows of each task of the validation; none without one."""
    validation = job.spec.validation
    if validation is None:
        return []
    windows = sum(count or WINDOWS for _, count in validation.sources.values())
    return shares(windows, window_tokens(job), workers, gpu=job.spec.resources.gpus_per_worker > 0)


def windows_of_originals(job: CompressionJob, workers: int, *, gpu: bool) -> list[list[range]]:
    """Windows of each worker, those together that one task runs through the original; none without a validation."""
    windows = sum(map(len, windows_of_workers(job, 1)))
    return original_shares(windows, window_tokens(job), workers, gpu=gpu) if windows else []


def window_tokens(job: CompressionJob) -> int:
    """Tokens of a window of the validation."""
    validation = job.spec.validation
    own = None if validation is None else validation.sequence_length
    return own or job.spec.calibration.sequence_length


def _originals(costs: Costs, dispatcher: Dispatcher) -> list[Node[HiddenRecord]]:
    """As `validate.add_originals`: each reads the whole model and runs its windows under it, on a GPU the next block beside.
    The node of each worker's windows."""
    divided = windows_of_originals(costs.job, dispatcher.workers, gpu=costs.rates.link is not None)
    whole = costs.rates.read(sum(map(costs.bytes_of, costs.source.tensors)), on_a_node(costs.job, len(divided)))
    whole += costs.rates.moved(costs.judged * costs.source.parameters)
    found: list[Node[HiddenRecord]] = []
    for together in divided:
        windows = range(together[0].start, together[-1].stop)
        steps = _validated(costs, whole, windows, 1, costs.rates.sent(_left(costs, windows)))
        node = dispatcher.graph.add(
            giving(Simulated(f"original {windows.start}", steps)), soon=originals_first(divided)
        )
        found += [node] * len(together)
    return found


def _validation(costs: Costs, workers: int) -> list[Simulated]:
    """Each reads the whole artifact, runs its windows under the models that are in it, and compares them with the original."""
    models = 2 if any(block.branch for block in costs.blocks) else 1
    # Codes are moved as they are stored; what the device makes of them is computed there.
    read = costs.rates.read(costs.stored, on_a_node(costs.job, workers)) + costs.rates.moved(costs.stored)
    dense = sum(block.read_back for block in costs.blocks) * models
    token = costs.rates.seconds(_judging(costs), itemsize=costs.judged) * (models + 1)
    return [
        Simulated(
            f"validation {share.start}",
            _validated(
                costs,
                read,
                share,
                models,
                costs.rates.received(_left(costs, share)) + token * len(share) * window_tokens(costs.job),
                dense=dense,
            ),
        )
        for share in windows_of_workers(costs.job, workers)
    ]


def _tasks(costs: Costs) -> list[Simulated]:
    """Of the harness."""
    if (asked := costs.asked) is None:
        return []
    return _on_whole_models(costs, "tasks", read=asked.read, written=asked.written, together=BATCH)


def _samples(costs: Costs) -> list[Simulated]:
    """Of what models write."""
    validation = costs.job.spec.validation
    if validation is None or (asked := validation.generation) is None:
        return []
    prompts = asked.prompts
    return _on_whole_models(
        costs, "samples", read=prompts * asked.prompt_tokens, written=prompts * asked.new_tokens, together=prompts
    )


def _on_whole_models(costs: Costs, name: str, *, read: int, written: int, together: int) -> list[Simulated]:
    """A task for each model, which is read as a whole. read: tokens of what is asked; written: of answers, `together` of them
    at a time, and every time passes over all weights."""
    rates, parameters = costs.rates, costs.source.parameters
    token = sum(block.evaluated for block in costs.blocks)
    token += rates.seconds(_judging(costs), itemsize=costs.judged)
    passes = -(-written // together)
    answered = (read + written) * token + passes * rates.seconds(elementwise(parameters))
    dense = sum(block.read_back for block in costs.blocks)
    sizes = {"baseline": sum(map(costs.bytes_of, costs.source.tensors)), "quantized": costs.stored}
    if any(block.branch for block in costs.blocks):
        sizes["compensated"] = costs.stored
    return [
        Simulated(
            f"{name} of {model}",
            {"read": rates.read(size) + rates.moved(costs.judged * parameters) + dense, name: answered},
        )
        for model, size in sizes.items()
    ]


def _validated(
    costs: Costs, read: float, share: range, models: int, behind: float, *, dense: float = 0.0
) -> dict[str, float]:
    """Steps of a task of the validation. read: seconds for all blocks; behind: what comes after them; dense: of making stored
    weights dense."""
    running = dense + sum(block.evaluated for block in costs.blocks) * models * len(share) * window_tokens(costs.job)
    if costs.rates.link is not None:
        # What is waited for: the first block, or what takes longer than the arithmetic.
        read = max(read / len(costs.blocks), read - running)
    return {"read for validation": read, "validate": running + behind}


def _left(costs: Costs, share: range) -> int:
    """Bytes of what enters the final norm of the original."""
    return len(share) * window_tokens(costs.job) * costs.source.layout.hidden_size * costs.judged


def _judging(costs: Costs) -> Work:
    """Of one token's logits under one model."""
    layout = costs.source.layout
    return product(1, layout.hidden_size, layout.vocabulary) + elementwise(JUDGED * layout.vocabulary)
