"""The solves that a block's linears are divided into, and which of them are done in one call. Torch-free.

The same division that `workers.block.compress` makes of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from counterweight.workers.batches import batch_size, batches
from counterweight.workers.footprint.load import Group, Load
from counterweight.workers.recipe import ModuleRecipe, solved_together


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """Linears of `group` of these `shapes` [out, in] that are solved as one. alone: no others of their group are; last: none
    behind them are."""

    group: Group
    part: ModuleRecipe
    shapes: tuple[tuple[int, int], ...]
    alone: bool
    last: bool

    @property
    def key(self) -> Hashable:
        """What is equal in the solves that are done in one call."""
        return self.part, self.shapes, self.alone

    def at_once(self, count: int, room: int) -> int:
        """How many matrices are coded in one loop over columns where `count` like this are done in one call: what is solved as
        one is one matrix, unless each has a branch that is fitted with its codes. room: see `batch_size`."""
        if not self.part.compensation.joint:
            return count
        return min(count * len(self.shapes), batch_size(self.part, self.shapes[:1], room))

    def loops(self, count: int, room: int) -> int:
        """How many such loops that takes."""
        matrices = count * len(self.shapes) if self.part.compensation.joint else count
        return -(-matrices // self.at_once(count, room))

    def most(self, room: int) -> int:
        """How many like this are done in one call."""
        return batch_size(self.part, self.shapes, room) if self.alone else 1


def batched(load: Load) -> list[list[Solve]]:
    """The solves of all groups by the call that they are done in, in order."""
    solves = [solve for group in load.groups for solve in _of(group)]
    return batches(solves, lambda solve: solve.key, lambda solve: solve.most(load.batch_bytes))


def _of(group: Group) -> Iterator[Solve]:
    solves = list(solved_together(group.recipe, {name: rows for name, (rows, _) in group.linears.items()}))
    for names in solves:
        yield Solve(
            group=group,
            part=group.recipe[names[0]],
            shapes=tuple(group.linears[name] for name in names),
            alone=len(solves) == 1,
            last=names is solves[-1],
        )
