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

Nobody waits for what leaves the last block, so it is not calibrated: from three workers on half of them share it, as soon as
the one before it is calibrated (`shared_blocks.last_parts`).

With a budget a block is calibrated once where its statistics fit in memory until the budget is shared out (`HOLD_BYTES`),
otherwise twice. In `compressed` gains are measured on the original's activations, so statistics are gathered twice. Segments
need no statistics of the original, which only runs over the blocks before the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
    last_parts,
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


@dataclass(kw_only=True)
class BlockNodes:
    """Adds nodes for all blocks behind the embedding.

    lasting: whether hidden states behind a block are written to the store, as its spec says. stretches: of the shards, in
    order, in which blocks are calibrated. segment: blocks after which one in `compressed` sees the original's activations
    again; None: none does. workers: that share the blocks, so that each knows which it takes next. ahead: whether they read one
    block while they do something else. units: of each block, which workers may share it by; empty: they share none.
    """

    graph: Graph
    recipes: Sequence[BlockRecipe]
    spec_of: SpecOf
    propagate: Literal["original", "compressed"]
    budget: Budget | None = None
    stretches: Sequence[range]
    segment: int | None = None
    workers: int = 1
    ahead: bool = False
    lasting: Callable[[int], bool] = lambda _: True
    units: Sequence[Sequence[Unit]] = ()

    def __post_init__(self) -> None:
        self._count = len(self.recipes)
        self._borders = range(0, self._count, self.segment or self._count)
        """The first block of each segment."""
        regresses = any(part.regresses for recipe in self.recipes for part in recipe.values())
        self._paired = self.propagate == "compressed" and regresses
        """Whether what enters a block in the original model goes beside what enters the compressed one."""
        self._ends: list[Sequence[Node[HiddenRecord]]] = []
        """What makes the shards that enter each block in the original model: one node for all, or one for each stretch."""
        self._behind: list[Sequence[Node[BlockRecord]] | Sequence[Node[PropagatedRecord]]] = []
        """What makes the shards behind each block in `compressed`."""
        self._gains: dict[int, Node[GainsRecord]] = {}
        self._compresses: list[Node[BlockRecord]] = []
        self._shares: dict[int, SharedBlock] = {}
        self._reading: dict[int, Node[None]] = {}
        self._foreseen: set[int] = set()
        """Blocks that a worker reads ahead while it compresses another one."""

    def add(self, embedded: Sequence[Node[HiddenRecord]]) -> Blocks:
        """Called once. embedded: what makes the shards that enter the first block, one node for each stretch or one for all."""
        self._ends.append(embedded)
        last = self._last_parts
        for index in range(self._count - bool(last) if self._apart or self.budget is not None else self._borders[-1]):
            self._add_calibration(index)
        if self._apart:
            self._add_compressions_apart(last)
        else:
            self._add_compressions_in_turn()
        return Blocks(
            tuple(self._compresses),
            tuple(node for own in self._ends[1:] for node in own),
            tuple(node for share in self._shares.values() for node in share.nodes),
            lambda index: self._compress(index).block,
        )

    @property
    def _apart(self) -> bool:
        """Whether no block waits for what the one before it is compressed to."""
        return self.propagate == "original"

    def _add_calibration(self, index: int) -> None:
        before = self._ends[index] if len(self._ends[index]) > 1 else [self._ends[index][0]] * len(self.stretches)
        if self.ahead and self.workers > 1:
            # By a worker that waits for what enters it, where it was not read while another one was solved.
            self._reading[index] = self.graph.add(partial(self._prefetch, index), wanted=False)
        own: list[Node[HiddenRecord]] = []
        for place, stretch in enumerate(self.stretches):
            own.append(
                self.graph.add(
                    partial(self._calibrate, index, stretch),
                    reads=before[place : place + 1],
                    uses=own[-1] if own else self._reading.get(index),
                    rereads=before[:place],
                    lasting=self.lasting(index),
                    wanted=False,
                    bytes=0 if self.budget is None else self.budget.bytes[index],
                )
            )
        if self.budget is not None and index in self.budget.blocks:
            measure = partial(self._measure, index)
            self._gains[index] = self.graph.add(measure, uses=own[-1], rereads=self._ends[index])
        self._ends.append(own)

    @property
    def _last_parts(self) -> list[tuple[str, ...]]:
        """Linears of the last block by those who solve them, where blocks are calibrated apart; none where it is done as a
        whole."""
        apart = self._apart and self.budget is None and self._count > 1 and self.units
        return last_parts(self.units[-1], self.workers) if apart else []

    def _add_compressions_apart(self, last: Sequence[tuple[str, ...]]) -> None:
        """last: parts of the last block, see `_last_parts`."""
        after = tuple(self._gains.values())
        for index in range(self._count - bool(last)):
            make, own = partial(self._compress, index), self._ends[index + 1][-1]
            self._compresses.append(self.graph.add(make, after=after, uses=own, rereads=self._ends[index]))
        if last:
            index = self._count - 1
            spec = partial(self._spec, index)
            solve = add_parts(self.graph, spec, last, reads=self._ends[index], after=after, following=lambda: None)
            self._shares[index] = SharedBlock(spec=spec, solve=solve, propagate=())
            self._compresses.append(self._shares[index].add_compress(self.graph))

    def _add_compressions_in_turn(self) -> None:
        """Each behind the one before it in its segment; workers that would wait for those which have a segment of their own
        share its blocks."""
        together = sharing(self.workers, self._count, self.segment)
        stretches = in_stretches(self.stretches[-1].stop, together)
        after = tuple(self._gains.values())
        unjoined: SharedBlock | None = None  # the block before, which is put together behind the parts of this one
        for index in range(self._count):
            parts = balanced(self.units[index], together) if self.units and together > 1 else []
            entered = self._ends[index] if index in self._borders else self._behind[-1]
            spec, beside = partial(self._spec, index), partial(self._beside, index)
            solve = add_parts(self.graph, spec, parts, reads=entered, after=after, following=beside)
            if unjoined is not None:
                self._compresses.append(unjoined.add_compress(self.graph))
                unjoined = None
            if parts:
                apiece = index not in self._borders and index - 1 in self._shares
                reads = [[node] for node in entered] if apiece else [entered] * len(stretches)
                unjoined = add_propagation(self.graph, spec, solve, stretches, reads=reads, lasting=self.lasting(index))
                self._shares[index] = unjoined
                self._behind.append(unjoined.propagate)
            else:
                make = partial(self._compress, index)
                node = self.graph.add(make, reads=entered, lasting=self.lasting(index), after=after)
                self._compresses.append(node)
                self._behind.append([node])
        if unjoined is not None:
            self._compresses.append(unjoined.add_compress(self.graph))

    # Tasks, made when a worker takes them.

    def _prefetch(self, index: int) -> Prefetch:
        return Prefetch(block=self.spec_of(index, self.recipes[index], (), (), "original"))

    def _calibrate(self, index: int, stretch: range) -> Calibrate:
        spec = self.spec_of(index, self.recipes[index], self._entering(index), (), "original")
        # Of a block that is compressed only the outputs can be wanted still, by those behind it.
        passing = (not self._apart and self.budget is None) or (not self._gains and self._compresses[index].done)
        shards = self.stretches[-1].stop
        return Calibrate(block=spec, shards=shards, start=stretch.start, stop=stretch.stop, passing=passing)

    def _measure(self, index: int) -> Gains:
        spec = self.spec_of(index, self.recipes[index], self._entering(index), (), "original")
        return Gains(block=spec, keep=self._apart)

    def _compress(self, index: int) -> Compress:
        if index in self._shares:
            return self._shares[index].compress()
        return Compress(block=self._spec(index), following=self._outlined(self._following(index)))

    # What they are made of.

    def _entering(self, index: int) -> tuple[Blob, ...]:
        """The shards that enter a block in the original model, from the first as far as they are known."""
        known = takewhile(lambda node: node.done, self._ends[index])
        return tuple(blob for node in known for blob in node.value.outputs)

    @cached_property
    def _shared_out(self) -> Sequence[BlockRecipe]:
        """Recipes with what the budget gives to each; asked when all gains are known."""
        if self.budget is None:
            return self.recipes
        return self.budget.share({index: node.value for index, node in self._gains.items()})

    def _spec(self, index: int) -> BlockSpec:
        if self._apart or index in self._borders:
            inputs = self._entering(index)
            originals = inputs if self._paired else ()
        else:
            inputs = tuple(blob for node in self._behind[index - 1] for blob in node.value.outputs)
            originals = tuple(blob for node in self._behind[index - 1] for blob in node.value.original_outputs)
        found = self.spec_of(index, self._shared_out[index], inputs, originals, self.propagate)
        budgeted = tuple(name for name, part in self.recipes[index].items() if part.budget_bits is not None)
        return found.model_copy(update={"budgeted": budgeted})

    def _outlined(self, index: int | None) -> BlockSpec | None:
        return None if index is None else self.spec_of(index, self.recipes[index], (), (), self.propagate)

    def _beside(self, index: int) -> BlockSpec | None:
        """The block that workers read while they solve one that they share."""
        found = index + 1
        wanted = self.budget is None and found < self._count and found not in self._borders
        return self._outlined(found) if wanted and not self._compresses[found].done else None

    def _begun(self, index: int) -> bool:
        """Whether a worker has begun with a block."""
        reading = [self._reading[index]] if index in self._reading else []
        calibrating = self._shares[index].solve if index in self._shares else self._ends[index + 1]
        own = [*calibrating, self._compresses[index], *reading]
        return any(node.running or node.ran for node in own)

    def _following(self, index: int) -> int | None:
        """The block that a worker takes behind this one, where that is known: in turn with those who have none, or the next of
        its segment."""
        count, borders = self._count, self._borders
        if self._apart and self._begun(index):
            left = [
                block for block in range(index + 1, count) if block not in self._foreseen and not self._begun(block)
            ]
            found = next(iter(left[self.workers - self.graph.busy :]), count)
        elif self._apart:
            found = index + self.workers  # this task is only looked up: nobody has begun
        else:
            found = index + 1
            if found in borders:
                found = index // borders.step * borders.step + self.workers * borders.step
        # With a budget it may hold the statistics, and the weights with them.
        known = self.budget is None and (self._apart or len(borders) >= self.workers)
        if not known or found >= count or self._compresses[found].done:
            return None
        self._foreseen.add(found)
        return found


FILLED = 100
"""A pipeline's work is this many times what its workers wait until all have begun: 1 % of it."""

EDGE = 3
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
