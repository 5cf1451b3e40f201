"""What the options of every stored format answer: `spec.recipe.weights` of a manifest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.matrix_flops import Work, elementwise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.methods.grid import WeightFormat
    from counterweight.workers.quantization.result import QuantizationResult


class StoredWeights(Config):
    """How a layer's weight is stored, and how the numbers that are stored are chosen."""

    rows_are_independent: ClassVar[bool] = True
    """Whether the rows of a weight are chosen each by itself, so that layers that share an input can be solved as one."""

    @abstractmethod
    def problem(self, rows: int, columns: int) -> str | None:
        """The option, its value and what was expected for a weight [rows, columns], to be followed by `of` and the weight's
        name; None when it can be stored like this."""

    @abstractmethod
    def stored_bits(self, rows: int, columns: int) -> int:
        """Storage of a weight [rows, columns] in bits, with scales of 16."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What chooses the codes, as a message names it."""

    @property
    @abstractmethod
    def looks_at_input(self) -> bool:
        """Whether what is stored depends on what calibration saw of the layer's input."""

    @property
    def unused_in_training(self) -> str | None:
        """The option, with its value and what was expected, that has no say where codes are trained; None: there is none."""
        return None

    @property
    def trained_grid(self) -> WeightFormat | None:
        """The grid on which codes can be trained by gradients through rounding to nearest; None where they cannot."""
        return None

    @property
    def regresses(self) -> str | None:
        """The option, with its value, that makes codes look at what the layer's input was meant to be, where it is another;
        None where none does."""
        return None

    def target(self, weight: Tensor, statistics: InputStatistics, branch: Tensor | None = None) -> Tensor:
        """What the codes are to reproduce, [out, in] in the weight's dtype; branch [out, in]: the product that stands beside
        them."""
        del statistics
        return weight if branch is None else weight - branch

    def quantize(
        self, target: Tensor, statistics: InputStatistics | None, *, scale_dtype: torch.dtype
    ) -> QuantizationResult:
        """`target` [out, in] float32 as it is stored. statistics: of what the codes will be multiplied by."""
        (found,) = self.quantize_batch(target.unsqueeze(0), [statistics], scale_dtype=scale_dtype)
        return found

    @abstractmethod
    def quantize_batch(
        self, targets: Tensor, statistics: Sequence[InputStatistics | None], *, scale_dtype: torch.dtype
    ) -> list[QuantizationResult]:
        """`targets` [batch, out, in] float32 as they are stored, each as it is alone. statistics: of each one's input."""

    def target_bytes(self, rows: int, columns: int) -> int:
        """Memory of `target` at its peak, beside its arguments; what stays is [rows, columns] float32. Nothing, where the
        target is the weight."""
        del rows, columns
        return 0

    @abstractmethod
    def quantize_bytes(self, rows: int, columns: int, batch: int = 1) -> int:
        """Memory of `quantize_batch` at its peak for targets [batch, rows, columns], beside its arguments."""

    def target_flops(self, rows: int, columns: int, *, branch: bool = False) -> Work:
        """Arithmetic of `target`; branch: whether there is one."""
        return elementwise(rows * columns * branch)

    @abstractmethod
    def quantize_flops(self, rows: int, columns: int) -> Work:
        """Arithmetic of `quantize` for a target [rows, columns]."""

    @abstractmethod
    def nearest_flops(self, entries: int) -> Work:
        """Arithmetic of `nearest` for a weight of so many entries."""

    @abstractmethod
    def nearest(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] float32 stored in the quickest way and read back: what a search over transforms compares."""
