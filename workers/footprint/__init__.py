"""How much memory a block's task takes, phase by phase: what every step says of itself, put together. Torch-free.

A task reads a block, runs it over its shards, solves its linears and writes what became of them. Each phase has what stays of
those before it and a peak of its own; the task's peak is the largest of them, not their sum. Where linears are solved in
several passes, the shards are run over and linears solved in each. On a GPU the arithmetic and what it reads lie on the device;
the source's tensors, and what is written, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from counterweight.workers.footprint.experts import drawn_share, feeding, kept_bytes
from counterweight.workers.footprint.forward import activations, held_out, running, tuning, unseen_bytes
from counterweight.workers.footprint.load import Group, Load, gathers, moments, packed
from counterweight.workers.footprint.solving import solving
from counterweight.workers.footprint.weights import (
    here,
    let_go,
    loading,
    original,
    preparing,
    reading,
    scaled,
    with_running,
)
from counterweight.workers.matrix_bytes import DOUBLE, SINGLE, triangle
from counterweight.workers.parallel import AHEAD, BEHIND

__all__ = ["Footprint", "Group", "Load", "footprint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a block's task.

    weights: as they were read and as they run. statistics: the sums of one pass. activations: of the shards in flight, with
    their own products. solve: at its peak, statistics and what is solved already included, beside the weights. phases: name ->
    everything that is in memory where the arithmetic is done, at that phase's peak. host: beside that on the host of a GPU; 0
    without one.
    """

    weights: int
    statistics: int
    activations: int
    solve: int
    phases: Mapping[str, int]
    host: int
    kept_peak: int
    """`peak` where the statistics of a block that is solved in one pass stay in memory, for it to be solved in another way."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def calibrated(self) -> int:
        """What calibration leaves: weights, and the sums of the statistics."""
        return self.weights + self.statistics

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def footprint(load: Load) -> Footprint:
    """The memory of a block's task; of one that is solved in several passes, that of the pass that takes most."""
    parts = [part for group in load.groups for part in group.recipe.values()]
    weights = here(load, scaled(load)) + unseen_bytes(load)
    packing = sum(packed(group) for group in load.groups)
    passes = load.by_pass()
    statistics = [sum(moments(one, group, DOUBLE) for group in one.groups) for one in passes]
    rows = kept_bytes(load)
    stays = rows if len(passes) > 1 else 0
    phases = {"load": loading(load), "prepare": preparing(load), "forward": 0, "solve": 0}
    left = solved = solve = 0
    for place, one in enumerate(passes):
        peak, own = solving(one)
        held = weights - left + solved
        phases["forward"] = max(phases["forward"], held + rows + _forward(one, statistics[place], first=place == 0))
        for further in _further(one, first=place == 0):
            running_on = statistics[place] + load.threads * further
            phases["forward"] = max(phases["forward"], held + rows + running_on)
        if rows:
            # Put together in the first pass, which has them twice.
            feed = max(rows, feeding(one)) if place == 0 else feeding(one)
            phases["starved"] = max(phases.get("starved", 0), held + rows + statistics[place] + feed)
        phases["solve"] = max(phases["solve"], held + stays + peak)
        solve = max(solve, peak)
        left += let_go(load, one)
        solved += 0 if load.gpu else own
    kept = weights - left + stays
    back = solved + (sum(solving(one)[1] for one in passes) if load.gpu else 0)
    phases["write"] = kept + solved + packing
    if any(part.tuning is not None for part in parts):
        phases["tune"] = weights + stays + statistics[0] + tuning(load)
    if load.compressed:
        # Where workers share the block, the original is run beside it.
        beside = original(load) if load.paired else 0
        phases["propagate"] = kept + beside + back + load.threads * running(load, stored=True)
    host = 0
    if load.gpu:
        # Hidden states as bytes and as a tensor, of the shards that are read and written; or what is written.
        moved = max(2 * (AHEAD + BEHIND) * load.shard * load.hidden * load.compute, packing)
        # The next block is read beside what becomes of this one.
        host = max(reading(load), scaled(load) + moved + load.source_bytes)
    return Footprint(
        weights=with_running(load, scaled(load)),
        statistics=max(statistics),
        activations=max(activations(one.of_shards(one.tokens)) for one in passes),
        solve=solve,
        phases=phases,
        host=host,
        kept_peak=max(*phases.values(), weights + solving(load, keep=True)[0], phases["write"] + max(statistics)),
    )


def _further(load: Load, *, first: bool) -> Iterator[int]:
    """Of a shard that follows those that everything is solved on, and runs beside their sums: drawn ones, and in the first pass
    those that are held out."""
    if load.drawn:
        lacking = [name for group in load.groups if drawn_share(load, group) for name in group.recipe]
        yield running(load.solving(lacking).of_shards(load.drawn_tokens), stored=False)
    if load.held_out and first:
        yield held_out(load)


def _forward(load: Load, statistics: int, *, first: bool) -> int:
    """Of one pass over the shards, beside the weights. statistics: bytes of its sums; first: whether it makes the outputs."""
    load = load.of_shards(load.tokens)
    shards = activations(load)
    kept = original(load) if first else 0
    products = sum(moments(load, group, SINGLE) for group in load.groups)
    # Before the first products there are only the sums of xx.
    begun = sum(DOUBLE * triangle(group.width) for group in load.groups if gathers(load, group))
    return max(
        kept + load.threads * running(load, stored=False),
        (kept if load.stretched else 0) + shards + (statistics if load.shards > 1 else begun),
        statistics + products,
    )
