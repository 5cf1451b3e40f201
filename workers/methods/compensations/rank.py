"""How the rank of a low-rank branch is asked for."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from counterweight.workers.config import Config

if TYPE_CHECKING:
    from torch import Tensor


class Rank(Config):
    """What every way to ask for a rank answers."""

    known_ahead: ClassVar[bool] = True
    """Whether the shape of a layer decides it, before anything of the layer is known."""

    @property
    def budget(self) -> float | None:
        """Bits per weight that all layers which ask like this share; None: each layer has a rank of its own."""
        return None

    @abstractmethod
    def resolve(self, rows: int, columns: int, singular_values: Tensor) -> int:
        """The rank for a weight [rows, columns] whose residual has the `singular_values` [min(rows, columns)], descending.
        ValueError when there is none."""

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a weight [rows, columns] is too small for it, or None when it is not."""
        del rows, columns
        return None

    def at_most(self, rows: int, columns: int) -> int:
        """The largest rank that a weight [rows, columns] can come by, before anything is known of its singular values."""
        return min(rows, columns)


class FractionRank(Rank):
    """A share of the largest rank that the layer can have."""

    fraction: Annotated[float, Field(strict=True, gt=0, le=1)]
    """Share of min(out, in), rounded to the nearest rank, at least 1."""

    def at_most(self, rows: int, columns: int) -> int:
        return max(1, round(self.fraction * min(rows, columns)))

    def resolve(self, rows: int, columns: int, singular_values: Tensor) -> int:
        """The rank for a weight [rows, columns]."""
        del singular_values
        return self.at_most(rows, columns)


class CountRank(Rank):
    """The same rank for every layer."""

    count: Annotated[int, Field(strict=True, ge=1)]
    """The rank; more than min(out, in) of a layer is an error."""

    def at_most(self, rows: int, columns: int) -> int:
        del rows, columns
        return self.count

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a weight [rows, columns] is too small for the rank, or None when it is not."""
        largest = min(rows, columns)
        return f"rank.count: {self.count}: expected at most {largest}" if self.count > largest else None

    def resolve(self, rows: int, columns: int, singular_values: Tensor) -> int:
        """The rank for a weight [rows, columns]; ValueError when the weight is too small for it."""
        del singular_values
        problem = self.problem(rows, columns)
        if problem is not None:
            raise ValueError(f"[{rows}, {columns}]: {problem}")
        return self.count


class EnergyRank(Rank):
    """As many directions as it takes to hold a share of the (whitened) residual: each layer gets what it needs."""

    known_ahead: ClassVar[bool] = False

    energy: Annotated[float, Field(strict=True, gt=0, le=1)]
    """Share of the sum of the singular values, as in ASER (Zhao et al. 2024); not of their squares."""

    def resolve(self, rows: int, columns: int, singular_values: Tensor) -> int:
        """The smallest r with sum_{i<=r} s_i >= energy * sum_i s_i; `singular_values` [min(rows, columns)] descend."""
        del rows, columns
        held = singular_values.cumsum(0)
        return min(int((held < self.energy * held[-1]).sum()) + 1, len(held))


class BudgetRank(Rank):
    """Ranks that share one budget over the whole model: each direction goes where it takes most error off for its bits."""

    known_ahead: ClassVar[bool] = False

    budget_bits: Annotated[float, Field(strict=True, gt=0, le=16)]
    """Bits per weight that the branches of all such layers may take together."""

    @property
    def budget(self) -> float:
        return self.budget_bits

    def resolve(self, rows: int, columns: int, singular_values: Tensor) -> int:
        """Never: the budget is shared out before layers are solved. ValueError."""
        del singular_values
        raise ValueError(f"[{rows}, {columns}]: rank.budget_bits: {self.budget_bits}: expected to be shared out first")


AnyRank = FractionRank | CountRank | EnergyRank | BudgetRank
"""The rank of a branch: `{fraction: f}`, `{count: n}`, `{energy: a}` or `{budget_bits: b}`."""
