"""A block that several workers share, as nodes of the graph: where each block sees what the compressed ones before it make, all
workers are at one block, or one of few; otherwise they share the last one, of which nothing is propagated.

    solve k, part 0 ──┐      ┌──> propagate k, shards 0 to 16 ──┐
    solve k, part 1 ──┼──────┼──> propagate k, shards 17 to 33 ─┼──> all parts of block k + 1
    ...             ──┘      └──> ...                         ──┘
                      └───────────────────────────────────────┴────> compress k, which puts together and stores

Each part gathers the statistics that it needs, on forward passes of its own over all shards: only solved linears and hidden
states pass from worker to worker. A block is put together behind the parts of the next one, by who is done with his first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from counterweight.pipeline.graph import Graph, Node
from counterweight.workers.arithmetic.units import Unit
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.propagate import Propagate, PropagatedRecord
from counterweight.workers.tasks.solve import Solve, SolvedRecord


def sharing(workers: int, blocks: int, segment: int | None) -> int:
    """Workers at each block, where so many compress segments of so many blocks beside each other; None: one of all blocks."""
    return max(1, workers // -(-blocks // (segment or blocks)))


def balanced(units: Sequence[Unit], count: int) -> list[tuple[str, ...]]:
    """Their linears in at most `count` parts that take about as long: the largest unit first, each where least is."""
    parts: list[list[str]] = [[] for _ in range(min(count, len(units)))]
    taken = [0] * len(parts)
    for unit in sorted(units, key=lambda unit: -unit.flops):
        place = taken.index(min(taken))
        parts[place] += unit.linears
        taken[place] += unit.flops
    return [tuple(part) for part in parts]


def last_parts(units: Sequence[Unit], workers: int) -> list[tuple[str, ...]]:
    """Parts of the last block where nobody waits for what leaves it: half of the workers are still at those before it when it
    can begin, about. None where that leaves one, or where one unit is more than half of the block: its worker would be the
    last in any case, and run the block over all shards beside the others."""
    count = -(-workers // 2)
    largest = max((unit.flops for unit in units), default=0)
    shared = count > 1 and 2 * largest <= sum(unit.flops for unit in units)
    return balanced(units, count) if shared else []


def in_stretches(shards: int, count: int) -> list[range]:
    """The shards in at most `count` stretches of about as many each."""
    count = min(shards, count)
    return [range(shards * place // count, shards * (place + 1) // count) for place in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBlock:
    """solve: a node for each part. propagate: for each stretch of shards."""

    spec: Callable[[], BlockSpec]
    solve: tuple[Node[SolvedRecord], ...]
    propagate: tuple[Node[PropagatedRecord], ...]

    @property
    def nodes(self) -> tuple[Node[SolvedRecord] | Node[PropagatedRecord], ...]:
        return (*self.solve, *self.propagate)

    def compress(self) -> Compress:
        """The task that puts it together."""
        return Compress(
            block=self.spec(),
            solved=tuple(node.value for node in self.solve),
            propagated=tuple(node.value for node in self.propagate),
        )

    def add_compress(self, graph: Graph) -> Node[BlockRecord]:
        """Its node; before the parts of no block that it could hold up."""
        return graph.add(self.compress, reads=self.solve, after=self.propagate, makes=False)


def add_parts(
    graph: Graph,
    spec: Callable[[], BlockSpec],
    parts: Sequence[tuple[str, ...]],
    *,
    reads: Sequence[Node[object]],
    after: Sequence[Node[object]],
    following: Callable[[], BlockSpec | None],
) -> tuple[Node[SolvedRecord], ...]:
    """Nodes that solve a block's linears. spec: of the block, once `reads`, whose hidden states enter it, and `after` are done.
    following: the block whose weights a worker reads meanwhile."""

    def solve(place: int) -> Solve:
        return Solve(block=spec(), linears=parts[place], part=place, parts=len(parts), following=following())

    return tuple(
        graph.add(partial(solve, place), reads=reads, after=after, wanted=False) for place in range(len(parts))
    )


def add_propagation(
    graph: Graph,
    spec: Callable[[], BlockSpec],
    solve: tuple[Node[SolvedRecord], ...],
    stretches: Sequence[range],
    *,
    reads: Sequence[Sequence[Node[object]]],
    lasting: bool,
) -> SharedBlock:
    """Nodes that run the block over its shards. reads: for each stretch, whose hidden states enter it."""

    def propagate(stretch: range) -> Propagate:
        solved = tuple(node.value for node in solve)
        return Propagate(block=spec(), solved=solved, start=stretch.start, stop=stretch.stop)

    nodes = tuple(
        graph.add(partial(propagate, stretch), reads=(*own, *solve), lasting=lasting, wanted=False)
        for stretch, own in zip(stretches, reads, strict=True)
    )
    return SharedBlock(spec=spec, solve=solve, propagate=nodes)
