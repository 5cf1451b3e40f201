"""What a compensation hands back."""

from __future__ import annotations

from dataclasses import dataclass

from counterweight.kernels.formats import LowRank
from counterweight.workers.quantization.result import Fallback


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationResult:
    """A branch, and every departure from the recipe that led to it.

    low_rank: the branch as it will be stored; None when there is nothing to add.
    """

    low_rank: LowRank | None
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def rank(self) -> int:
        """Rank of the branch, 0 when there is none."""
        return 0 if self.low_rank is None else self.low_rank.rank
