"""Which solves are done in one call: those of one shape and recipe, such as a block's experts, as many as memory allows.

Torch-free, so that a plan can ask. A result does not depend on the batch that it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import TypeVar

from counterweight.workers.matrix_bytes import DOUBLE, SINGLE
from counterweight.workers.recipe import ModuleRecipe

BATCH_BYTES = {False: 32 << 20, True: 2 << 30}
"""On a GPU or not -> bytes that a batch of more than one may take where nothing is known of its memory. 32 experts of 256 x
128 take 32 MiB, and 64 of them are no faster; what does not fit caches of a few MiB is no faster in a larger batch. On a GPU a
batch shares out what it costs to start operations: a plan that knows the memory gives it more, or less (`footprint.division`).
8 experts' gates and ups, of 768 x 2048 each, take 1.1 GiB; 8 down projections of Mixtral 23."""

Solve = TypeVar("Solve")


def batches(
    solves: Sequence[Solve], key: Callable[[Solve], Hashable], most: Callable[[Solve], int]
) -> list[list[Solve]]:
    """Solves with the same key together, at most `most` of them, in the order in which each batch begins. most: the same for
    all solves of a key."""
    found: list[list[Solve]] = []
    open_: dict[Hashable, list[Solve]] = {}
    sizes: dict[Hashable, int] = {}
    for solve in solves:
        own = key(solve)
        if own not in sizes:
            sizes[own] = most(solve)
        if own not in open_ or len(open_[own]) >= sizes[own]:
            open_[own] = []
            found.append(open_[own])
        open_[own].append(solve)
    return found


def batch_size(part: ModuleRecipe, shapes: Sequence[tuple[int, int]], room: int) -> int:
    """How many solves of linears of these `shapes`, which share an input, are done in one call of at most `room` bytes; 1 where
    codes were chosen before."""
    if part.tuning is not None:
        return 1
    count = 1
    while coding(part, shapes, 2 * count) <= room:
        count *= 2
    return count


def coding(part: ModuleRecipe, shapes: Sequence[tuple[int, int]], count: int) -> int:
    """Bytes of choosing the codes of `count` weights of these shapes, with a branch that is fitted to them at once: second
    moments of their inputs, the weights in float32, what is held of them besides, and the peak."""
    rows, columns = sum(rows for rows, _ in shapes), shapes[0][1]
    entries = SINGLE * sum(map(prod, shapes))
    moments = (1 if part.activations is None else 3) * DOUBLE * columns * columns
    if part.compensation.joint:
        # Tokens are not known here: the most that it can be.
        solving = part.compensation.solve_bytes(
            part.weights, shapes[0][0], columns, 0, count * len(shapes), siblings=len(shapes) > 1
        )
        return count * (moments + entries) + solving
    return count * (moments + 2 * entries) + max(count * entries, part.weights.quantize_bytes(rows, columns, count))
