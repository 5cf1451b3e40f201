"""Weights as integer codes on a uniform grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_flops import Work, elementwise, product64, right_divide
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ, AnyQuantizer
from counterweight.workers.methods.weights.stored import StoredWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.quantization.result import QuantizationResult


class Weights(WeightFormat, StoredWeights):
    """Integer grid of the weights and the algorithm that chooses the codes."""

    quantizer: AnyQuantizer = Field(default_factory=GPTQ)
    """How the codes are chosen."""

    def grid(self) -> WeightFormat:
        """The grid alone."""
        return WeightFormat(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def problem(self, rows: int, columns: int) -> str | None:
        if self.group_size is not None and columns % self.group_size:
            return f"group_size: {self.group_size}: expected a divisor of {columns}, the width"
        return None

    def stored_bits(self, rows: int, columns: int) -> int:
        groups = columns // self.group_size if self.group_size else 1
        zero_points = 0 if self.symmetric else rows * groups * self.bits
        return rows * columns * self.bits + rows * groups * 16 + zero_points

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def label(self) -> str:
        return self.quantizer.kind

    @property
    def looks_at_input(self) -> bool:
        return self.quantizer.looks_at_input

    @property
    def unused_in_training(self) -> str | None:
        return self.quantizer.unused_in_training

    @property
    def trained_grid(self) -> WeightFormat | None:
        return self.grid() if self.quantizer.rounds_to_nearest else None

    @property
    def regresses(self) -> str | None:
        return self.quantizer.regresses

    def target(self, weight: Tensor, statistics: InputStatistics, branch: Tensor | None = None) -> Tensor:
        return self.quantizer.aim(weight, statistics, branch)

    def quantize_batch(
        self, targets: Tensor, statistics: Sequence[InputStatistics | None], *, scale_dtype: torch.dtype
    ) -> list[QuantizationResult]:
        return self.quantizer.quantize_batch(targets, statistics, self.grid(), scale_dtype=scale_dtype)

    def nearest(self, weight: Tensor) -> Tensor:
        from counterweight.workers.quantization.grid import nearest

        return nearest(weight, self.grid())

    def target_bytes(self, rows: int, columns: int) -> int:
        if self.regresses is None:
            return 0
        entries = matrix_bytes.DOUBLE * rows * columns
        # The products; the regression beside them; what is left of the weight, scaled twice, and the sum.
        return entries + max(matrix_bytes.right_divide(rows, columns), 4 * entries)

    def quantize_bytes(self, rows: int, columns: int, batch: int = 1) -> int:
        return self.quantizer.quantize_bytes(rows, columns, batch)

    def target_flops(self, rows: int, columns: int, *, branch: bool = False) -> Work:
        entries = rows * columns
        if self.regresses is None:
            return super().target_flops(rows, columns, branch=branch)
        # What the weight makes of the input that was meant, less what the branch makes of the real one; both shares, and a sum.
        products = product64(rows, columns, columns) * (1 + branch) + elementwise(2 * entries * branch)
        return products + right_divide(rows, columns) + elementwise(3 * entries)

    def quantize_flops(self, rows: int, columns: int) -> Work:
        return self.quantizer.quantize_flops(rows, columns, symmetric=self.symmetric)

    def nearest_flops(self, entries: int) -> Work:
        # The range, codes, and their values.
        return elementwise((6 if self.symmetric else 7) * entries)
