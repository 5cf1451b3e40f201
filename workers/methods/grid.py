"""The uniform grid of a quantized weight, as a manifest asks for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from counterweight.workers.config import Config


class WeightFormat(Config):
    """The grid of a quantized weight."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a code."""
    group_size: Annotated[int, Field(strict=True, gt=0, multiple_of=32)] | None = None
    """Input columns that share a scale, a multiple of 32; null: one scale per output channel."""
    symmetric: bool = True
    """Whether the grid is centred on zero; otherwise each group has a zero point of its own."""

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale in a weight of this width.

        ValueError when groups do not tile it: stock loaders (compressed-tensors 0.20) refuse a ragged last group.
        """
        if self.group_size is None:
            return columns
        if columns % self.group_size:
            raise ValueError(f"weight: {columns} input columns: expected a multiple of group_size {self.group_size}")
        return self.group_size
