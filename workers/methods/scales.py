"""How the scales of a uniform grid are chosen. A further way is a class here, and its name in `AnyScaleSearch`."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from counterweight.workers.config import Method
from counterweight.workers.matrix_flops import Work, elementwise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.methods.grid import WeightFormat
    from counterweight.workers.quantization.grid import Grid


STRIDE = 4
"""Every fourth candidate is tried first, then the three on either side of the best: 16 trials instead of 40 (20 candidates,
both signs). The error stays within 2 % of the least of all 40; where few channels carry nearly all importance, within 15 %."""


class ScaleSearch(Method):
    """What every way to choose scales answers."""

    @property
    @abstractmethod
    def looks_at_importance(self) -> bool:
        """Whether a column counts by what its rounding errors cost."""

    @abstractmethod
    def fit(
        self, weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, importance: Tensor | None = None
    ) -> Grid:
        """The grid of `weight` [..., out, in] float32, its scales rounded to `scale_dtype`; of several weights each as it is
        alone.

        importance: [..., in] float32, non-negative; None: all columns are alike. ValueError for groups that do not tile the
        weight and for a scale that does not fit its dtype.
        """

    @abstractmethod
    def fit_flops(self, entries: int, *, symmetric: bool) -> Work:
        """Arithmetic of `fit` for a weight of so many entries; what is done once a group is left out."""


class AbsoluteMaximum(ScaleSearch):
    """The scale that covers the whole range of the group: no value moves by more than half a step."""

    VERSION: ClassVar[int] = 1

    kind: Literal["absmax"] = "absmax"

    @property
    def looks_at_importance(self) -> bool:
        return False

    def fit(
        self, weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, importance: Tensor | None = None
    ) -> Grid:
        from counterweight.workers.quantization.grid import covering_grid

        del importance
        return covering_grid(weight, format, scale_dtype)

    def fit_flops(self, entries: int, *, symmetric: bool) -> Work:
        del symmetric
        return elementwise(entries)


class MeanSquare(ScaleSearch):
    """The scale with the smallest error of rounding and clipping, among candidates that give up part of the range.

    Candidates are evenly spaced multiples, 1 - shrink .. 1, of the range that `absmax` covers; the error of a group is
    sum_j importance_j * |q(w_j) - w_j|**norm.
    """

    VERSION: ClassVar[int] = 1

    kind: Literal["mse"] = "mse"
    norm: Annotated[float, Field(gt=0, le=8)] = 2.0
    """Exponent of the rounding error. 2 is the exponent of the output error; others cost a power per element."""
    candidates: Annotated[int, Field(strict=True, ge=2, le=1000)] = 20
    """How many ranges are tried, for each sign."""
    shrink: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of the range that the boldest candidate gives up."""
    weighted: bool = True
    """Whether a column counts by what its rounding errors cost. RTN: E[x^2] of its input. GPTQ: the part of E[x^2] that
    the columns rounded after it cannot make up for."""
    signed: bool = True
    """Whether a symmetric scale may be negative. Codes reach one step further down than up; the sign decides which end of
    the group gets that step. Costs nothing at inference; no effect on an asymmetric grid."""

    @property
    def looks_at_importance(self) -> bool:
        return self.weighted

    def fit(
        self, weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, importance: Tensor | None = None
    ) -> Grid:
        from counterweight.workers.quantization.grid import searched_grid

        return searched_grid(self, weight, format, scale_dtype, importance)

    def fit_flops(self, entries: int, *, symmetric: bool) -> Work:
        # The first pass for each sign, then the neighbours of the best.
        coarse = len(range(0, self.candidates, STRIDE)) * (2 if self.signed and symmetric else 1)
        # Divided, rounded, clamped, subtracted, raised to the norm, weighted, summed.
        each = 6 + (self.norm != 2) + self.weighted
        return elementwise(entries * (1 + each * (coarse + 2 * (STRIDE - 1))))


AnyScaleSearch = Annotated[AbsoluteMaximum | MeanSquare, Field(discriminator="kind")]
