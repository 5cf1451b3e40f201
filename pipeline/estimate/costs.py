"""Seconds of a block's tasks, step by step, from what the plan knows of its arithmetic and its bytes, and from rates.

On a CPU a worker's threads share shards and solves. On a GPU one thread computes, while others read and write the hidden states
of shards: what they take longer than the arithmetic is waited for, and of each stretch of shards the first that is read and the
last that is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from math import prod

from counterweight.pipeline.rates import Rates
from counterweight.workers.arithmetic import Arithmetic
from counterweight.workers.arithmetic.forward import passes, run
from counterweight.workers.arithmetic.preparing import rotating
from counterweight.workers.footprint.load import Group, Load, factors, packed
from counterweight.workers.matrix_bytes import SINGLE
from counterweight.workers.matrix_flops import Work, elementwise
from counterweight.workers.parallel import AHEAD, BEHIND

BEGINNING, STREAMED, ENDING = (
    ("read", "rotate", "prepare"),
    ("hidden states", "forward", "statistics"),
    ("tune", "solve", "write"),
)
"""Steps before the first shard of a block, of every shard, and behind the last."""

DEQUANTIZED = 6
"""Operations on an entry of a stored weight that is read back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSeconds:
    """steps: name -> seconds, over all shards. shards: how many there are. stored: bytes that become of the block; branch: of
    these the factors of its branches. evaluated: seconds of one token of the validation in this block under one model, in
    the dtype of the validation. read_back: of making its stored weights dense. edge: of reading the first shard of a stretch
    and writing the last, which nothing hides. passed: steps of all shards where no statistics are gathered."""

    steps: Mapping[str, float]
    shards: int
    stored: int
    branch: int
    evaluated: float
    read_back: float
    edge: float = 0.0
    passed: Mapping[str, float] = field(default_factory=dict)

    def beginning(self) -> Mapping[str, float]:
        """Steps before the first shard."""
        return {name: self.steps[name] for name in BEGINNING}

    def streamed(self, shards: int, *, passing: bool = False) -> Mapping[str, float]:
        """Steps of a stretch of so many shards. passing: without statistics."""
        steps = self.passed if passing else self.steps
        found = {name: steps[name] * shards / self.shards for name in STREAMED}
        found["hidden states"] += self.edge if shards else 0.0
        return found

    def ending(self) -> Mapping[str, float]:
        """Steps behind the last shard."""
        return {name: self.steps[name] for name in ENDING}


def again(blocks: Sequence[BlockSeconds], count: int) -> float:
    """At worst, of a death: so many blocks are run again, of which only outputs are wanted, and one as a whole."""

    def passing(block: BlockSeconds) -> float:
        return sum(block.beginning().values()) + sum(block.streamed(block.shards, passing=True).values())

    return sum(nlargest(count, map(passing, blocks))) + max(sum(block.steps.values()) for block in blocks)


def block_seconds(
    load: Load,
    arithmetic: Arithmetic,
    rates: Rates,
    *,
    judged: int = 4,
    kept: float = 0.0,
    written: float = 1.0,
    away: float | None = None,
) -> BlockSeconds:
    """Of a block's tasks on one worker. judged: bytes of an activation when the model is validated. kept: share of the hidden
    states that is read from memory; away: of these, share that lies on another node, None where the memory is the worker's
    own; written: share of those behind the block that goes to the store."""
    threads = running_threads(load)
    branch, solved = sum(map(factors, load.groups)), solved_of(load)
    stored = sum(map(stored_of, load.groups)) + load.compute * (load.parameters - solved)
    rotated = rotating(load)
    hidden = load.all_tokens * load.hidden * load.compute
    passing_on = Passing(hidden, kept, written, away)
    # The compressed block is run over the shards too; behind it there may be those of the original beside its own.
    reads, writes = passes(load) + load.compressed, 1 + load.paired
    running = load.parameters * load.compute
    once = run(load, load.all_tokens)
    forward = rates.seconds(arithmetic.forward + once * -float(load.passed), itemsize=load.compute) / threads
    statistics = gathering(load, arithmetic.statistics, rates) / threads
    passing = rates.seconds(once, itemsize=load.compute) / threads
    steps = {
        "read": rates.read(load.source_bytes) + rates.moved(running),
        "rotate": rates.seconds(rotated)
        + (rates.moved(load.source_bytes + SINGLE * load.parameters) if rotated.total else 0),
        "prepare": rates.seconds(arithmetic.prepare + rotated * -1.0),
        "hidden states": waiting(load, rates, passing_on, reads, writes, forward + statistics),
        "forward": forward,
        "statistics": statistics,
        "tune": rates.seconds(arithmetic.tune),
        "solve": (rates.seconds(arithmetic.solve) + rates.moved(4 * solved)) / load.threads,
        # Of every tensor a digest too, which a GPU's host has cores to find while the tensors are sent.
        "write": rates.sent(stored) + (0.0 if load.gpu else stored / rates.hash) + rates.moved(stored),
    }
    return BlockSeconds(
        steps=steps,
        shards=load.all_shards,
        stored=round(stored),
        branch=round(branch),
        evaluated=rates.seconds(run(load, load.tokens), itemsize=judged) / load.tokens,
        read_back=rates.seconds(elementwise(DEQUANTIZED * solved)),
        edge=(reads * passing_on.reading(rates) + writes * passing_on.writing(rates)) / load.all_shards
        if load.gpu
        else 0.0,
        passed={
            "hidden states": waiting(load, rates, passing_on, 1, 1, passing),
            "forward": passing,
            "statistics": 0.0,
        },
    )


@dataclass(frozen=True, slots=True)
class Passing:
    """Hidden states of so many bytes that enter and leave a block. kept, written, away: as in `block_seconds`. Other nodes are
    reached at the rate of the storage: by one link."""

    bytes: float
    kept: float
    written: float
    away: float | None

    @property
    def fetched(self) -> float:
        """Share that is read from the memory of other nodes."""
        return self.kept * (self.away or 0.0)

    def reading(self, rates: Rates) -> float:
        """Seconds of one thread."""
        fetching = self.fetched * self.bytes / rates.storage
        return rates.received(self.bytes * (1.0 - self.kept)) + fetching + rates.moved(self.bytes)

    def writing(self, rates: Rates) -> float:
        """Likewise; all are hashed, and what others read is copied."""
        copying = 0.0 if self.away is None else self.kept * self.bytes / rates.copied
        return self.bytes / rates.hash + copying + self.written * self.bytes / rates.storage + rates.moved(self.bytes)

    def stored(self, rates: Rates, reads: int, writes: int) -> float:
        """Seconds of the link to storage and other nodes, where they are read and written so often."""
        return (reads * (1.0 - self.kept + self.fetched) + writes * self.written) * self.bytes / rates.storage


def waiting(load: Load, rates: Rates, hidden: Passing, reads: int, writes: int, computing: float) -> float:
    """Seconds for hidden states that are read and written so often. computing: seconds of the arithmetic, beside which a GPU's
    host does so."""
    reading, writing = reads * hidden.reading(rates), writes * hidden.writing(rates)
    if not load.gpu:
        return (reading + writing) / min(load.threads, load.shards)
    return max(0.0, max(hidden.stored(rates, reads, writes), reading / AHEAD, writing / BEHIND) - computing)


def gathering(load: Load, work: Work, rates: Rates) -> float:
    """Seconds for statistics. On a GPU products of streams are taken in the dtype of the activations, both kinds by one kernel;
    everything else is in float32."""
    if not (load.gpu and load.compute == 2):
        return rates.seconds(work)
    sums = Work(grams32=work.grams32 + work.products32)
    return rates.seconds(sums, itemsize=2) + rates.seconds(replace(work, grams32=0, products32=0))


def running_threads(load: Load) -> int:
    """Threads that share a shard's pieces, and shards."""
    return min(load.threads, load.shards * -(-load.shard // load.piece))


def solved_of(load: Load) -> int:
    """Entries of the weights that are solved."""
    return sum(prod(group.linears[name]) for group in load.groups for name in group.recipe)


def stored_of(group: Group) -> int:
    """Bytes that become of a group's linears, with their branches."""
    return packed(group) + factors(group)
