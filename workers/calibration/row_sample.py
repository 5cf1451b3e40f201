"""Evenly spaced tokens out of a stream of shards, whose number is not known ahead."""

from __future__ import annotations

import torch
from torch import Tensor


class RowSample:
    """At most `limit` of the rows that were added, more than half as many where there were enough: of each shard every s-th,
    from its first, with s the smallest power of two for which that is so. Of more shards than that, one row of each."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Tensor] = []
        self._step = 1

    @property
    def bytes(self) -> int:
        """Memory of the rows."""
        return sum(rows.nbytes for rows in self._kept)

    def add(self, rows: Tensor) -> None:
        """Takes in a shard's rows [tokens, in], in the order of the shards."""
        # Copies, because a slice would keep the whole shard in memory.
        self._kept.append(rows[:: self._step].clone())
        while sum(map(len, self._kept)) > self._limit and any(len(kept) > 1 for kept in self._kept):
            self._step *= 2
            self._kept = [kept[::2].clone() for kept in self._kept]

    def rows(self) -> Tensor | None:
        """The rows [tokens, in], in the dtype in which they came; None when there were none."""
        found = [kept for kept in self._kept if len(kept)]
        return torch.cat(found) if found else None
