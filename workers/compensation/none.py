"""No compensation, as a choice that a recipe can name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workers.calibration.statistics import InputStatistics
from workers.compensation.result import CompensationResult
from workers.config import Config


class NoCompensation(Config):
    """Nothing is put back."""

    kind: Literal["none"] = "none"

    def problem(self, rows: int, columns: int) -> str | None:
        """None: always possible."""
        del rows, columns
        return None

    @property
    def anticipates(self) -> bool:
        """Never."""
        return False

    def anticipate(self, statistics: InputStatistics, rows: int) -> InputStatistics:
        """`statistics`: nothing follows that the quantizer could count on."""
        del rows
        return statistics

    def solve(
        self, residual_target: Tensor, statistics: InputStatistics | None, *, dtype: torch.dtype
    ) -> CompensationResult:
        """No branch."""
        del statistics, dtype
        nothing = residual_target.new_zeros(0, dtype=torch.float64)
        return CompensationResult(low_rank=None, captured=0.0, singular_values=nothing)
