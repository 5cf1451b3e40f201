"""Sequences that are drawn for experts which saw too few tokens: their tokens are added to these experts' sums alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.statistics import Gathering, ShardMoments
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.parallel import Share

if TYPE_CHECKING:
    from counterweight.workers.shards import RunningStatistics


class DrawnStatistics:
    """Adds the moments of drawn shards to running sums, for `run_shards`.

    lacking: the groups that get them -> tokens that they saw before, decided before the first drawn shard. So it follows from
    the first shards alone, however drawn ones are divided among tasks, and a group that reaches its floor on the way gets the
    rest too. An expert that saw enough keeps the sums of the first shards to the bit.
    """

    every_token = False
    sample: RowSample | None = None

    def __init__(self, sums: RunningStatistics, lacking: Mapping[SharedInputGroup, int]) -> None:
        self.lacking = lacking
        self.gatherings: Mapping[SharedInputGroup, Gathering] = {group: sums.gatherings[group] for group in lacking}
        self._sums = sums

    def of(
        self, group: SharedInputGroup, rows: Tensor, original: Tensor | None, share: Share[None]
    ) -> ShardMoments | None:
        """See `RunningStatistics`."""
        return self._sums.of(group, rows, original, share)

    def takes_all(self, groups: Iterable[SharedInputGroup]) -> bool:
        """See `RunningStatistics`."""
        return self._sums.takes_all(groups)

    def of_all(self, groups: Sequence[SharedInputGroup | None], rows: Tensor, bounds: Tensor) -> None:
        """See `Gatherer`."""
        self._sums.of_all([group if group in self.lacking else None for group in groups], rows, bounds)

    def refuses(self, group: SharedInputGroup) -> bool:
        """See `RunningStatistics`."""
        return self._sums.refuses(group)

    def add(self, moments: dict[SharedInputGroup, ShardMoments | None], given: list[Tensor]) -> None:
        """See `Gatherer`. Of the tokens that experts are given none is kept: the layer's are those of the first shards."""
        self._sums.add(moments, given)
