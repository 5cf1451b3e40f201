"""What every quantizer answers: how the codes of a uniform grid are chosen. `workers/quantization` has the mathematics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Method
from counterweight.workers.matrix_flops import Work
from counterweight.workers.methods.grid import WeightFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.quantization.result import QuantizationResult


class Quantizer(Method):
    """Chooses codes; by itself it aims at the weight."""

    rounds_to_nearest: ClassVar[bool] = False
    """Whether each code is the nearest to its weight, so that gradients can be passed through the rounding."""

    kind: str

    @property
    @abstractmethod
    def looks_at_input(self) -> bool:
        """Whether codes and scales depend on what calibration saw of the layer's input."""

    @property
    def unused_in_training(self) -> str | None:
        """The option, with its value and what was expected, that has no say where codes are trained; None: there is none."""
        return None

    @property
    def regresses(self) -> str | None:
        """The option, with its value, that makes codes look at what the layer's input was meant to be; None: none does."""
        return None

    def aim(self, weight: Tensor, statistics: InputStatistics, branch: Tensor | None = None) -> Tensor:
        """The matrix [out, in] that the codes are to reproduce, in the weight's dtype; branch: the product beside them."""
        del statistics
        return weight if branch is None else weight - branch

    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        format: WeightFormat,
        *,
        scale_dtype: torch.dtype,
    ) -> QuantizationResult:
        """Codes of `weight` [out, in] float32 on a grid of `format`. statistics: of what they will be multiplied by."""
        (found,) = self.quantize_batch(weight.unsqueeze(0), [statistics], format, scale_dtype=scale_dtype)
        return found

    @abstractmethod
    def quantize_batch(
        self,
        weights: Tensor,
        statistics: Sequence[InputStatistics | None],
        format: WeightFormat,
        *,
        scale_dtype: torch.dtype,
    ) -> list[QuantizationResult]:
        """Codes of `weights` [batch, out, in] float32, of each those that it has alone. statistics: of each one's input."""

    @abstractmethod
    def quantize_bytes(self, rows: int, columns: int, batch: int = 1) -> int:
        """Memory of `quantize_batch` at its peak, beside the weights [batch, rows, columns] float32 and the statistics."""

    @abstractmethod
    def quantize_flops(self, rows: int, columns: int, *, symmetric: bool) -> Work:
        """Arithmetic of `quantize` for a weight [rows, columns] on a grid that is symmetric or not."""
