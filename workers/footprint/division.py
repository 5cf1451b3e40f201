"""A block's linears in as few passes over its shards, and on a GPU in as large batches, as memory allows. Torch-free.

What is not divided: a group of linears that share an input, because they share its statistics; and an expert, because it runs
as long as one of its linears is to be solved.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate

from counterweight.workers.batches import BATCH_BYTES
from counterweight.workers.footprint import Footprint, footprint
from counterweight.workers.footprint.load import Load, moments
from counterweight.workers.matrix_bytes import DOUBLE
from counterweight.workers.models.family import is_expert

Passes = tuple[tuple[str, ...], ...]


FILLED = 0.6
"""Share of a GPU's memory up to which batches may raise a peak: what the model says of a GPU has not been measured, and half as
large a batch takes hardly longer."""


def fitted(load: Load, budget: int) -> tuple[Load, Footprint]:
    """The load with `passes`, and on a GPU with `batch_bytes`, and the memory of its task, at a peak of at most `budget` bytes:
    undivided where it fits at once; where no division fits, the finest one."""
    small = replace(load, batch_bytes=min(load.batch_bytes, BATCH_BYTES[False]))
    passes, found = _divided(small, budget)
    done = replace(small, passes=passes)
    return _batched(done, found, budget) if load.gpu else (done, found)


def _batched(load: Load, found: Footprint, budget: int) -> tuple[Load, Footprint]:
    """In the largest batches, of powers of two, that do not raise the peak above `FILLED` of the budget; on the way to a peak
    that is above it anyway they cost nothing. found: in the smallest."""
    most = max(found.peak, int(FILLED * budget))
    rooms = [load.batch_bytes << shift for shift in range(max(1, (budget // load.batch_bytes).bit_length()))]

    @cache
    def with_room(room: int) -> tuple[Load, Footprint]:
        roomy = replace(load, batch_bytes=room)
        return roomy, footprint(roomy)

    place = bisect_left(rooms, True, key=lambda room: with_room(room)[1].peak > most)
    return with_room(rooms[max(place - 1, 0)])


def _divided(load: Load, budget: int) -> tuple[Passes, Footprint]:
    """`BlockSpec.passes`, and the memory of the task with them."""
    whole = footprint(load)
    if whole.peak <= budget:
        return (), whole
    units = list(units_of(load).items())
    if len(units) < 2:
        return (), whole

    @cache
    def with_passes(count: int) -> tuple[Passes, Footprint]:
        passes = _in_runs(units, count)
        return passes, footprint(replace(load, passes=passes))

    def fits(count: int) -> bool:
        return with_passes(count)[1].peak <= budget

    # By doubling first: the more passes, the longer their memory takes to be told, and few are enough as a rule.
    above = 2
    while above < len(units) and not fits(above):
        above = min(2 * above, len(units))
    counts = range(max(2, above // 2 + 1), above + 1)
    place = bisect_left(counts, True, key=fits)
    return with_passes(counts[min(place, len(counts) - 1)])


def units_of(load: Load) -> dict[tuple[str, ...], int]:
    """Linears that are solved after one pass at least, in order, and the bytes of their statistics."""
    found: dict[str, tuple[tuple[str, ...], int]] = {}
    for group in load.groups:
        if group.recipe:
            first = next(iter(group.linears))
            key = first.rpartition(".")[0] if is_expert(first) else first
            names, size = found.get(key, ((), 0))
            found[key] = ((*names, *group.recipe), size + moments(load, group, DOUBLE))
    return dict(found.values())


def _in_runs(units: Sequence[tuple[tuple[str, ...], int]], count: int) -> Passes:
    """The units in `count` runs of about as many bytes each, none of them empty."""
    total = sum(size for _, size in units)
    runs: list[list[str]] = [[] for _ in range(count)]
    place, ends = 0, list(accumulate(size for _, size in units))
    for index, (names, size) in enumerate(units):
        middle = (ends[index] - size / 2) / total
        # A run for each unit that is left, at the latest.
        place = max(min(int(middle * count), place + bool(index)), count - (len(units) - index), place)
        runs[place].extend(names)
    return tuple(tuple(run) for run in runs)
