"""What a compensation hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.workers.quantization.result import Fallback


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationResult:
    """A branch, what it is worth, and every departure from the recipe that led to it.

    low_rank: the branch as it will be stored; None when there is nothing to add. captured: share of the squared
    residual, in the metric of the solve, that the stored branch removes: 0 nothing, 1 all. singular_values: of the
    residual in that metric, [min(out, in)] float64, descending; empty when none were needed.
    """

    low_rank: LowRank | None
    captured: float
    singular_values: Tensor
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def rank(self) -> int:
        """Rank of the branch, 0 when there is none."""
        return 0 if self.low_rank is None else self.low_rank.rank
