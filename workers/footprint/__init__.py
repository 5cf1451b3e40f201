"""How much memory a block's task takes, phase by phase: what every step says of itself, put together. Torch-free.

A task reads a block, runs it over its shards, solves its linears and writes what became of them. Each phase has what stays of
those before it and a peak of its own; the task's peak is the largest of them, not their sum. On a GPU the arithmetic and what
it reads lie on the device; the source's tensors, and what is written, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from counterweight.workers.footprint.forward import activations, feeding, running, tuning
from counterweight.workers.footprint.load import Group, Load, kept_rows, packed, products_of, sums
from counterweight.workers.footprint.solving import solving
from counterweight.workers.footprint.weights import loading, original, preparing, reading, scaled, with_running
from counterweight.workers.matrix_bytes import DOUBLE, SINGLE

__all__ = ["Footprint", "Group", "Load", "footprint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a block's task.

    weights: as they were read and as they run. statistics: the sums. activations: of the shards in flight, with their own
    products. solve: at its peak, beside weights, statistics and what is solved already. phases: name -> everything that is in
    memory where the arithmetic is done, at that phase's peak. host: beside that on the host of a GPU; 0 without one.
    """

    weights: int
    statistics: int
    activations: int
    solve: int
    phases: Mapping[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def footprint(load: Load) -> Footprint:
    """The memory of a block's task."""
    parts = [part for group in load.groups for part in group.recipe.values()]
    weights = with_running(load, scaled(load))
    statistics = sum(sums(load, group) for group in load.groups)
    products = sum(SINGLE * group.width**2 * products_of(load, group) for group in load.groups)
    first = sum(DOUBLE * group.width**2 for group in load.groups if group.recipe)
    whole = max((DOUBLE * group.width**2 for group in load.groups if group.recipe), default=0)
    shards = activations(load)
    kept = original(load)
    rows = load.compute * kept_rows(load) * load.hidden
    peak, solved = solving(load)
    phases = {
        "load": loading(load),
        "prepare": preparing(load),
        # Before the first products there are only the sums of xx; at last each sum is made symmetric.
        "forward": weights
        + rows
        + max(
            kept + load.threads * running(load, stored=False),
            (kept if load.stretched else 0) + shards + (statistics if load.shards > 1 else first),
            statistics + max(products, whole),
        ),
        "solve": weights + statistics + peak,
        "write": weights + statistics + solved + sum(packed(group) for group in load.groups),
    }
    if rows:
        phases["starved"] = weights + statistics + feeding(load)
    if any(part.tuning is not None for part in parts):
        phases["tune"] = weights + statistics + tuning(load)
    if load.compressed:
        phases["propagate"] = weights + statistics + solved + load.threads * running(load, stored=True)
    host = 0
    if load.gpu:
        # Hidden states as bytes and as a tensor, or what is written.
        moved = max(2 * load.shard * load.hidden * load.compute, sum(packed(group) for group in load.groups))
        host = max(reading(load), scaled(load) + moved)
    return Footprint(weights=weights, statistics=statistics, activations=shards, solve=peak, phases=phases, host=host)
