"""The statistics of many inputs in about half of their memory: squares exist only while somebody solves with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from counterweight.workers.calibration.statistics import InputStatistics, PackedMoments
from counterweight.workers.models.family import SharedInputGroup


class PackedStatistics(MutableMapping[SharedInputGroup, InputStatistics]):
    """Statistics of groups of linears, held `packed`: for whoever looks one up, squares are made anew."""

    def __init__(self, packed: Mapping[SharedInputGroup, PackedMoments]) -> None:
        self.packed = dict(packed)

    @property
    def bytes(self) -> int:
        """Memory of all of them, packed."""
        return sum(moments.bytes for moments in self.packed.values())

    def __getitem__(self, group: SharedInputGroup) -> InputStatistics:
        return self.packed[group].unpacked()

    def __setitem__(self, group: SharedInputGroup, statistics: InputStatistics) -> None:
        self.packed[group] = PackedMoments.of(statistics)

    def __delitem__(self, group: SharedInputGroup) -> None:
        del self.packed[group]

    def __contains__(self, group: object) -> bool:
        return group in self.packed

    def __iter__(self) -> Iterator[SharedInputGroup]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)
