"""The blocks of a model as nodes of the graph.

    propagate: original     embed ──> calibrate 0 ──> calibrate 1 ──> ...      compress k uses what calibrate k left in memory
    propagate: compressed   embed ──> compress 0  ──> compress 1  ──> ...                on several workers: `shared_blocks`
    ... in segments         embed ──> calibrate 0 ──> calibrate 1 ──> ..., of which each segment's first compress takes the last
    a budget of bits        calibrate k ──> gains k, all gains ──> the shares ──> every compress

In `original` shards of tokens stream through the blocks: a block is calibrated in stretches of shards, one task each, on the
worker that has the sums of those before; a stretch enters as soon as it left the block before. So as many blocks are calibrated
at a time as there are workers, and each is compressed where its statistics are when the last stretch has passed.

    block 0   s0 s1 s2 s3 compress          block 2   ...
    block 1      s0 s1 s2 s3 compress

With a budget a block is calibrated once where its statistics fit in memory until the budget is shared out (`HOLD_BYTES`),
otherwise twice. In `compressed` gains are measured on the original's activations, so statistics are gathered twice. Segments
need no statistics of the original, which only runs over the blocks before the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from math import sqrt
from typing import Literal, Protocol

from counterweight.pipeline.graph import Graph, Node
from counterweight.pipeline.shared_blocks import (
    SharedBlock,
    add_parts,
    add_propagation,
    balanced,
    in_stretches,
    sharing,
)
from counterweight.workers.arithmetic.units import Unit
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.gains import Gains, GainsRecord
from counterweight.workers.tasks.prefetch import Prefetch
from counterweight.workers.tasks.propagate import PropagatedRecord
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.solve import SolvedRecord
from counterweight.workers.workspace import Blob

BlockRecipe = Mapping[str, ModuleRecipe]
"""Linear (name in the block) -> what applies to it."""


class SpecOf(Protocol):
    """Makes a block's spec."""

    def __call__(
        self,
        index: int,
        recipe: BlockRecipe,
        inputs: tuple[Blob, ...],
        original_inputs: tuple[Blob, ...],
        propagate: Literal["original", "compressed"],
    ) -> BlockSpec: ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Ranks that a whole model shares out. blocks: those with a layer that takes part. share: gains of each of these ->
    recipes of all blocks, with ranks in the place of budgets. bytes: of each block's statistics and weights in memory."""

    blocks: frozenset[int]
    share: Callable[[Mapping[int, GainsRecord]], Sequence[BlockRecipe]]
    bytes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A model's blocks in the graph. compress: one node a block. calibrate: of all blocks, where they are calibrated apart.
    shared: of what workers make of a block that they share. spec: what a block is made from, once its node is known."""

    compress: tuple[Node[BlockRecord], ...]
    calibrate: tuple[Node[HiddenRecord], ...]
    shared: tuple[Node[SolvedRecord] | Node[PropagatedRecord], ...]
    spec: Callable[[int], BlockSpec]

    @property
    def records(self) -> list[BlockRecord]:
        """In block order; when all are done."""
        return [node.value for node in self.compress]

    @property
    def reused(self) -> list[BlockRecord]:
        """Of the blocks that earlier jobs had finished."""
        return [node.value for node in self.compress if node.reused]

    @property
    def discardable(self) -> list[Blob]:
        """Every blob of hidden states, and of parts of blocks, that can be made again: all but the embedding's output, from
        which a job that shares these blocks, and runs now, finds its way when the others are gone."""
        return [blob for node in (*self.calibrate, *self.shared, *self.compress) for blob in node.hidden_states]


def add_blocks(
    graph: Graph,
    embedded: Node[HiddenRecord],
    recipes: Sequence[BlockRecipe],
    spec_of: SpecOf,
    *,
    propagate: Literal["original", "compressed"],
    budget: Budget | None = None,
    stretches: Sequence[range],
    segment: int | None = None,
    workers: int = 1,
    ahead: bool = False,
    lasting: Callable[[int], bool] = lambda _: True,
    units: Sequence[Sequence[Unit]] = (),
) -> Blocks:
    """Nodes for all blocks behind the embedding. lasting: whether hidden states behind a block are written to the store, as its
    spec says. stretches: of the shards, in order, in which blocks are calibrated. segment:
    blocks after which one in `compressed` sees the original's activations again; None: none does. workers: that share the
    blocks, so that each knows which it takes next. ahead: whether they read one block while they do something else. units: of
    each block, which workers may share it by; empty: they do not."""
    count = len(recipes)
    borders = range(0, count, segment or count)  # the first block of each segment
    # Whether what enters a block in the original model goes beside what enters the compressed one.
    paired = propagate == "compressed" and any(part.regresses for recipe in recipes for part in recipe.values())
    ends: list[Sequence[Node[HiddenRecord]]] = [[embedded]]
    """What makes the shards that enter each block in the original model: one node for all, or one for each stretch."""
    gains: dict[int, Node[GainsRecord]] = {}
    compresses: list[Node[BlockRecord]] = []
    shares: dict[int, SharedBlock] = {}
    behind: list[Sequence[Node[BlockRecord]] | Sequence[Node[PropagatedRecord]]] = []
    """What makes the shards behind each block in `compressed`."""
    reading: dict[int, Node[None]] = {}
    foreseen: set[int] = set()
    """Blocks that a worker reads ahead while it compresses another one."""

    def entering(index: int) -> tuple[Blob, ...]:
        """The shards that enter a block in the original model, from the first as far as they are known."""
        known = takewhile(lambda node: node.done, ends[index])
        return tuple(blob for node in known for blob in node.value.outputs)

    def calibrate(index: int, stretch: range) -> Calibrate:
        spec = spec_of(index, recipes[index], entering(index), (), "original")
        # Of a block that is compressed only the outputs can be wanted still, by those behind it.
        passing = (propagate == "compressed" and budget is None) or (not gains and compresses[index].done)
        return Calibrate(block=spec, shards=stretches[-1].stop, start=stretch.start, stop=stretch.stop, passing=passing)

    def measure(index: int) -> Gains:
        spec = spec_of(index, recipes[index], entering(index), (), "original")
        return Gains(block=spec, keep=propagate == "original")

    @cache
    def shared() -> Sequence[BlockRecipe]:
        return recipes if budget is None else budget.share({index: node.value for index, node in gains.items()})

    def spec(index: int) -> BlockSpec:
        if propagate == "original" or index in borders:
            inputs = entering(index)
            originals = inputs if paired else ()
        else:
            inputs = tuple(blob for node in behind[index - 1] for blob in node.value.outputs)
            originals = tuple(blob for node in behind[index - 1] for blob in node.value.original_outputs)
        found = spec_of(index, shared()[index], inputs, originals, propagate)
        budgeted = tuple(name for name, part in recipes[index].items() if part.budget_bits is not None)
        return found.model_copy(update={"budgeted": budgeted})

    def compress(index: int) -> Compress:
        if index in shares:
            return shares[index].compress()
        return Compress(block=spec(index), following=outlined(following(index)))

    def outlined(index: int | None) -> BlockSpec | None:
        return None if index is None else spec_of(index, recipes[index], (), (), propagate)

    def beside(index: int) -> BlockSpec | None:
        """The block that workers read while they solve one that they share."""
        found = index + 1
        wanted = budget is None and found < count and found not in borders and not compresses[found].done
        return outlined(found if wanted else None)

    def begun(index: int) -> bool:
        """Whether a worker has begun with a block."""
        own = [*ends[index + 1], compresses[index], *([reading[index]] if index in reading else [])]
        return any(node.running or node.ran for node in own)

    def following(index: int) -> int | None:
        """The block that a worker takes behind this one, where that is known: in turn with those who have none, or the next of
        its segment."""
        if propagate == "original" and begun(index):
            left = [block for block in range(index + 1, count) if block not in foreseen and not begun(block)]
            found = next(iter(left[workers - graph.busy :]), count)
        elif propagate == "original":
            found = index + workers  # this task is only looked up: nobody has begun
        else:
            found = index + 1
            if found in borders:
                found = index // borders.step * borders.step + workers * borders.step
        # With a budget it may hold the statistics, and the weights with them.
        known = budget is None and (propagate == "original" or len(borders) >= workers)
        if not known or found >= count or compresses[found].done:
            return None
        foreseen.add(found)
        return found

    def prefetch(index: int) -> Prefetch:
        return Prefetch(block=spec_of(index, recipes[index], (), (), "original"))

    through = count if propagate == "original" or budget is not None else borders[-1]
    # Each is read by a worker that waits for what enters it, where it was not read while another one was solved.
    early = ahead and workers > 1
    for index in range(through):
        size = 0 if budget is None else budget.bytes[index]
        before = ends[index] if len(ends[index]) > 1 else [ends[index][0]] * len(stretches)
        own: list[Node[HiddenRecord]] = []
        if early:
            reading[index] = graph.add(partial(prefetch, index), wanted=False)
        for place, stretch in enumerate(stretches):
            own.append(
                graph.add(
                    partial(calibrate, index, stretch),
                    reads=before[place : place + 1],
                    uses=own[-1] if own else reading.get(index),
                    rereads=before[:place],
                    lasting=lasting(index),
                    wanted=False,
                    bytes=size,
                )
            )
        if budget is not None and index in budget.blocks:
            gains[index] = graph.add(partial(measure, index), uses=own[-1], rereads=ends[index])
        ends.append(own)
    after = tuple(gains.values())
    # Workers that would wait for those which have a segment of their own share its blocks.
    together = sharing(workers, count, segment)
    apart = in_stretches(stretches[-1].stop, together)
    unjoined: SharedBlock | None = None
    for index in range(count):
        make = partial(compress, index)
        if propagate == "original":
            compresses.append(graph.add(make, after=after, uses=ends[index + 1][-1], rereads=ends[index]))
            continue
        parts = balanced(units[index], together) if units and together > 1 else []
        entered = ends[index] if index in borders else behind[-1]
        block = partial(spec, index)
        solve = add_parts(graph, block, parts, reads=entered, after=after, following=partial(beside, index))
        if unjoined is not None:
            compresses.append(unjoined.add_compress(graph))
            unjoined = None
        if parts:
            apiece = index not in borders and index - 1 in shares
            reads = [[node] for node in entered] if apiece else [entered] * len(apart)
            unjoined = add_propagation(graph, block, solve, apart, reads=reads, lasting=lasting(index))
            shares[index] = unjoined
            behind.append(unjoined.propagate)
        else:
            compresses.append(graph.add(make, reads=entered, lasting=lasting(index), after=after))
            behind.append(compresses[-1:])
    if unjoined is not None:
        compresses.append(unjoined.add_compress(graph))
    return Blocks(
        tuple(compresses),
        tuple(node for own in ends[1:] for node in own),
        tuple(node for share in shares.values() for node in share.nodes),
        lambda index: compress(index).block,
    )


FILLED = 100
"""A pipeline's work is this many times what its workers wait until all have begun: 1 % of it."""

EDGE = 2
"""Shards that a GPU computes while one is read and another written, about: what it waits for in each stretch, because only
between these two do others read and write beside it. By `counterweight plan` with an H100's rates 0.6 (Mixtral-8x7B, W4A4 LRC)
to 3 (GPTQ)."""


def stretches(shards: int, blocks: int, workers: int, threads: int, *, gpu: bool = False) -> list[range]:
    """The shards of the calibration tokens, in stretches in which blocks are calibrated: all at once by a single worker.

    Otherwise each of w workers calibrates blocks / w blocks, and the last one waits for w - 1 stretches before it begins. A CPU
    takes as many shards as a worker has threads, so that none of them waits for long; more where that makes more tasks than the
    pipeline needs to be full. On a GPU, whose every stretch costs `EDGE` shards, n shards cost a worker
    blocks / w * shards / n * EDGE + (w - 1) n: the least at the root of EDGE * shards * blocks / w / (w - 1).
    """
    if workers == 1:
        return [range(shards)]
    passed = shards * blocks / (workers * (workers - 1))  # by a worker, for each one that the last one waits for
    length = max(1, round(sqrt(EDGE * passed))) if gpu else max(threads, int(passed / FILLED))
    return [range(shards)[start : start + length] for start in range(0, shards, length)]
