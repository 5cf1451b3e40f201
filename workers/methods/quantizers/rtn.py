"""Rounding to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers.quantizer import Quantizer
from counterweight.workers.methods.scales import AbsoluteMaximum, AnyScaleSearch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.quantization.result import QuantizationResult


class RTN(Quantizer):
    """Round to nearest. Needs no calibration unless its scale search is weighted."""

    VERSION: ClassVar[int] = 1
    rounds_to_nearest: ClassVar[bool] = True

    kind: Literal["rtn"] = "rtn"
    scale: AnyScaleSearch = Field(default_factory=AbsoluteMaximum)
    """How scales are chosen."""

    @property
    def looks_at_input(self) -> bool:
        return self.scale.looks_at_importance

    @property
    def unused_in_training(self) -> str | None:
        default = AbsoluteMaximum().kind
        return None if self.scale.kind == default else f"quantizer.scale.kind: {self.scale.kind}: expected {default}"

    def quantize_batch(
        self,
        weights: Tensor,
        statistics: Sequence[InputStatistics | None],
        format: WeightFormat,
        *,
        scale_dtype: torch.dtype,
    ) -> list[QuantizationResult]:
        """See `workers.quantization.rtn`."""
        from counterweight.workers.quantization.rtn import rtn

        return rtn(self, weights, statistics, format, scale_dtype)

    def quantize_bytes(self, rows: int, columns: int, batch: int = 1) -> int:
        gram = matrix_bytes.DOUBLE * columns * columns if self.scale.looks_at_importance else 0
        return gram + (matrix_bytes.SINGLE + batch) * rows * columns  # one's codes in float32, all in int8

    def quantize_flops(self, rows: int, columns: int, *, symmetric: bool) -> Work:
        # The check and the mean of the Gram matrix; the weight's own check, and its codes.
        gram = elementwise(2 * columns**2) if self.scale.looks_at_importance else NOTHING
        return gram + self.scale.fit_flops(rows * columns, symmetric=symmetric) + elementwise(5 * rows * columns)
