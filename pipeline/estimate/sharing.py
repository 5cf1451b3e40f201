"""Seconds of a block that workers share: of a part of its linears, of a stretch of its shards, and of putting it together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from counterweight.pipeline.estimate.costs import Passing, gathering, running_threads, solved_of, stored_of, waiting
from counterweight.pipeline.rates import Rates
from counterweight.workers.arithmetic.forward import propagating, run, statistics
from counterweight.workers.arithmetic.solving import solving
from counterweight.workers.footprint.load import Load
from counterweight.workers.models.family import is_expert

Steps = Mapping[str, float]
"""Name of a step -> its seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSeconds:
    """stored: bytes that become of the whole block. kept, written, away: see `block_seconds`."""

    load: Load
    rates: Rates
    stored: int
    kept: float = 0.0
    written: float = 1.0
    away: float | None = None
    _parts: dict[tuple[str, ...], Steps] = field(default_factory=dict, repr=False)

    def solve(self, linears: tuple[str, ...]) -> Steps:
        """Of a part, behind what comes before the first shard. Workers run all but the experts of others."""
        if linears not in self._parts:
            self._parts[linears] = self._solve(linears)
        return self._parts[linears]

    def install(self) -> Steps:
        """Of reading what was solved, once on each worker."""
        solved = sum(map(stored_of, self.load.groups))
        return {"read": self.rates.received(solved) + self.rates.moved(solved)}

    def propagate(self, shards: int) -> Steps:
        """Of a stretch of so many shards, through the compressed block, and through the original one where their activations
        are passed on too."""
        work = propagating(self.load) + run(self.load, self.load.all_tokens) * float(self.load.paired)
        forward = self.rates.seconds(work, itemsize=self.load.compute) / self._threads
        waited = waiting(self.load, self.rates, self._hidden, self._streams, self._streams, forward)
        share = shards / self.load.all_shards
        edge = self._edge(self._streams, self._streams)
        return {"hidden states": waited * share + edge, "forward": forward * share}

    def compress(self) -> Steps:
        """Of putting the block together."""
        rates = self.rates
        hashed = 0.0 if self.load.gpu else self.stored / rates.hash
        return {"read": rates.received(self.stored), "write": rates.sent(self.stored) + hashed}

    def _solve(self, linears: tuple[str, ...]) -> Steps:
        load, rates = self.load, self.rates
        own = load.with_only(linears)
        runs = load.with_only(
            [name for group in load.groups for name in group.linears if not is_expert(name)] + [*linears]
        )
        passes = sum(not set(names).isdisjoint(linears) for names in load.passes) or 1
        times = self._streams * passes
        forward = rates.seconds(run(runs, load.all_tokens) * float(times), itemsize=load.compute) / self._threads
        gathered = gathering(own, statistics(own), rates) / self._threads
        solved, stored = solved_of(own), sum(map(stored_of, own.groups))
        computed = rates.seconds(solving(replace(own, passes=())))
        return {
            "hidden states": waiting(load, rates, self._hidden, times, 0, forward + gathered) + self._edge(times, 0),
            "forward": forward,
            "statistics": gathered,
            "solve": (computed + rates.moved(4 * solved)) / load.threads,
            "write": rates.sent(stored) + rates.moved(stored),
        }

    @property
    def _streams(self) -> int:
        """That enter the block, and leave it: with the original's activations two."""
        return 1 + self.load.paired

    @property
    def _threads(self) -> int:
        return running_threads(self.load)

    @property
    def _hidden(self) -> Passing:
        return Passing(self.load.all_tokens * self.load.hidden * self.load.compute, self.kept, self.written, self.away)

    def _edge(self, reads: int, writes: int) -> float:
        """Of the first shards that are read and the last that are written, which nothing hides."""
        if not self.load.gpu:
            return 0.0
        hidden = self._hidden
        return (reads * hidden.reading(self.rates) + writes * hidden.writing(self.rates)) / self.load.all_shards
