"""Rows of what enters a block's linears on tokens that nothing is solved on, to judge by what was solved on others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.models.family import SharedInputGroup, is_expert
from counterweight.workers.parallel import Share

if TYPE_CHECKING:
    from counterweight.workers.models.block_builder import Block

LIMIT = 1024
"""Rows of each input that are kept at most, evenly spaced in each shard."""


@dataclass(frozen=True, slots=True)
class Rows:
    """x: what enters a group of linears [tokens, in], in the dtype in which the block computes. original: what enters them of
    the same tokens in the original model; None where that is x. of_layer: of an expert's, that the router sent most of the
    tokens elsewhere."""

    x: Tensor
    original: Tensor | None = None
    of_layer: bool = False


class HeldOutRows:
    """Keeps rows of the inputs of a block's linears, of held-out shards, for `run_shards`; and of what experts are given."""

    every_token = False

    def __init__(self, block: Block, gatherings: Mapping[SharedInputGroup, Gathering]) -> None:
        self.gatherings = gatherings
        sparse = block.separate_experts() is not None and any(is_expert(group[0]) for group in gatherings)
        self.sample = RowSample(LIMIT) if sparse else None
        self._own: dict[SharedInputGroup, RowSample] = {}
        self._originals: dict[SharedInputGroup, RowSample] = {}

    @property
    def bytes(self) -> int:
        """Memory of the rows."""
        kept = [*self._own.values(), *self._originals.values(), *(() if self.sample is None else [self.sample])]
        return sum(sample.bytes for sample in kept)

    def of(self, group: SharedInputGroup, rows: Tensor, original: Tensor | None, share: Share[None]) -> Rows:
        """Of one shard [..., in], no more than the limit."""
        flat, step = rows.reshape(-1, rows.shape[-1]), 1
        while len(flat) > LIMIT * step:
            step *= 2
        # Copies, because a slice would keep the whole shard's rows of every group in memory.
        kept = None if original is None else original.reshape(flat.shape)[::step].clone()
        return Rows(flat[::step].clone(), kept)

    def takes_all(self, groups: Iterable[SharedInputGroup]) -> bool:
        """See `Gatherer`: of each expert rows are kept."""
        return False

    def of_all(self, groups: Sequence[SharedInputGroup | None], rows: Tensor, bounds: Tensor) -> None:
        """See `Gatherer`."""
        raise NotImplementedError

    def refuses(self, group: SharedInputGroup) -> bool:
        """See `Gatherer`."""
        return False

    def add(self, found: dict[SharedInputGroup, Rows], given: list[Tensor]) -> None:
        """Takes a shard's rows out of `found`, and the tokens that experts were given out of `given`."""
        while given:
            tokens = given.pop()
            if self.sample is not None:
                self.sample.add(tokens)
        while found:
            group, rows = found.popitem()
            self._own.setdefault(group, RowSample(LIMIT)).add(rows.x)
            if rows.original is not None:
                # As many rows of every shard as of x, so that the same ones stay.
                self._originals.setdefault(group, RowSample(LIMIT)).add(rows.original)

    def rows(self, group: SharedInputGroup) -> Rows | None:
        """Those of a group; None where no token reached it."""
        own, original = self._own.get(group), self._originals.get(group)
        x = None if own is None else own.rows()
        return None if x is None else Rows(x, None if original is None else original.rows())
