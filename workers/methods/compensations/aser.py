"""Error reconstruction with the outlier channels taken out of the codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_flops import Work
from counterweight.workers.methods.compensations.branch import Branch
from counterweight.workers.methods.compensations.rank import AnyRank, CountRank
from counterweight.workers.methods.compensations.svd import SVD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.compensation.aser import TakenOut
    from counterweight.workers.compensation.result import CompensationResult


class ASER(Branch):
    """Error reconstruction by whitened SVD, with the outlier channels taken out of the codes (Zhao et al. 2024).

    The `outliers` input channels that are large in both activations and weights are scaled down where the norm or the layer
    before can do it, their columns of the weight go to the branch whole, and codes are made of the rest.
    """

    VERSION: ClassVar[int] = 6
    needs_rows: ClassVar[bool] = True

    kind: Literal["aser"] = "aser"
    rank: AnyRank = Field(default_factory=lambda: CountRank(count=64))
    """Rank of the branch; the columns that were taken out need up to `outliers` of it. By energy, it is the rank for what
    rounding left, and theirs comes on top."""
    outliers: Annotated[int, Field(strict=True, ge=0, le=1024)] = 32
    """How many input channels are taken out, at most half of the rank and of all; 0: error reconstruction alone."""
    choose: Literal["activations", "product"] = "activations"
    """What makes an outlier: a large E|x_i|, or as in the paper a large E|x_i| * mean_o |W_oi|. Rounding errors are alike in
    all columns of a row, so large activations with small weights suffer most; the product overlooks them."""
    reference: Literal["median", "minimum"] = "median"
    """What an outlier channel is scaled down to: the median channel's mean magnitude, or the smallest of the outliers'."""
    smoothing: bool = True
    """Whether outlier channels are scaled down; otherwise their columns are taken out as they are."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mean of E[x^2] that is added to each channel's."""

    @model_validator(mode="after")
    def _chooses_what_it_takes_out(self) -> ASER:
        if self.choose != "activations" and not self.outliers:
            raise ValueError(f"choose: {self.choose}: expected activations with 0 outliers, of which none is chosen")
        if self.reference != "median" and not (self.outliers and self.smoothing):
            raise ValueError(f"reference: {self.reference}: expected median unless outliers are scaled down")
        return self

    @property
    def of_finished_codes(self) -> bool:
        return self.outliers == 0

    @property
    def needs_products(self) -> bool:
        return True

    @property
    def scales_inputs(self) -> bool:
        return self.outliers > 0 and self.smoothing

    def take_out(self, weights: Sequence[Tensor], magnitude: Tensor, rows: int) -> TakenOut | None:
        from counterweight.workers.compensation.aser import TakenOut, outlier_channels, outlier_scales

        if not self.outliers:
            return None
        channels = outlier_channels(weights, magnitude, rows, self)
        scales = outlier_scales(magnitude, channels, self) if self.smoothing else None
        return TakenOut(channels=channels, scales=scales)

    def fit(
        self,
        residual: Tensor,
        statistics: InputStatistics | None,
        *,
        taken: Tensor | None = None,
        dtype: torch.dtype,
    ) -> CompensationResult:
        from counterweight.workers.compensation.aser import reconstruction

        return reconstruction(self, residual, statistics, taken, dtype)

    def fit_bytes(self, rows: int, columns: int, tokens: float) -> int:
        # Where the spectrum decides the rank, what rounding left is a residual of its own.
        rounding = 0 if self.rank.known_ahead else matrix_bytes.SINGLE * rows * columns
        return rounding + SVD(rank=self.rank).fit_bytes(rows, columns, tokens)

    def fit_flops(self, rows: int, columns: int, tokens: float) -> Work:
        once = SVD(rank=self.rank, damping=self.damping).fit_flops(rows, columns, tokens)
        # Where the spectrum decides the rank, also of what rounding left; a budget has been shared out by then.
        known = self.rank.known_ahead or self.rank.budget is not None
        return once if known or not self.outliers else once * 2
