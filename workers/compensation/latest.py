"""What was made of an input's statistics, for linears one behind the other that read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from counterweight.workers.calibration.statistics import InputStatistics

Made = TypeVar("Made")


class Latest(Generic[Made]):
    """Holds what `make` made of the statistics that were asked for last, and nothing else."""

    def __init__(self, make: Callable[[InputStatistics], Made]) -> None:
        self._make = make
        self._held: tuple[InputStatistics, Made] | None = None

    def of(self, statistics: InputStatistics) -> Made:
        """What was made of these very statistics, or is now."""
        if self._held is None or self._held[0] is not statistics:
            self._held = None
            self._held = (statistics, self._make(statistics))
        return self._held[1]

    def drop(self) -> None:
        """Gives up what is held."""
        self._held = None
