"""Whitened SVD of what the codes left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes, matrix_flops
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, product64
from counterweight.workers.methods.compensations.branch import Branch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.compensation.result import CompensationResult


class SVD(Branch):
    """Truncated singular value decomposition of the (whitened) residual."""

    VERSION: ClassVar[int] = 5

    kind: Literal["svd"] = "svd"
    whitening: Literal["none", "magnitude", "diagonal", "full"] = "full"
    """The metric: none, the plain residual (LoRC); magnitude, each input channel by its E|x| (L2QER); diagonal, by the root of
    its E[x^2] (QERA-approx); full, the layer's output error on the calibration tokens (QERA-exact, EoRA)."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mean of E[x^2] that is added to each channel's: how much to trust directions that calibration saw
    little of. Needs diagonal or full whitening."""

    anticipation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the quantizer leaves to the branch what the branch can do. 0: it minimizes its own error. 1: errors along
    the strongest directions of the input, as many as the branch has ranks, cost it nothing. Needs full whitening, a
    rank that is known in advance and codes that look at the input. Near 1 the error is smaller with the branch and several
    times larger without it; up to a half little is won."""

    @model_validator(mode="after")
    def _damps_what_there_is(self) -> SVD:
        if self.damping and self.whitening not in ("diagonal", "full"):
            raise ValueError(f"damping: {self.damping:g}: expected 0 unless whitening is diagonal or full")
        return self

    @model_validator(mode="after")
    def _anticipates_what_it_does(self) -> SVD:
        if self.anticipation and (self.whitening != "full" or not self.rank.known_ahead):
            raise ValueError("anticipation: expected 0 unless whitening is full and rank is a fraction or a count")
        return self

    @property
    def anticipates(self) -> bool:
        return self.anticipation > 0

    @property
    def of_finished_codes(self) -> bool:
        return not self.anticipates

    def foresee(self, statistics: InputStatistics, rows: int) -> InputStatistics:
        from counterweight.workers.compensation.svd import deflated

        return deflated(self, statistics, rows)

    def fit(
        self,
        residual: Tensor,
        statistics: InputStatistics | None,
        *,
        taken: Tensor | None = None,
        dtype: torch.dtype,
    ) -> CompensationResult:
        from counterweight.workers.compensation.svd import svd

        del taken
        return svd(self, residual, statistics, dtype)

    @property
    def needs_magnitudes(self) -> bool:
        return self.whitening == "magnitude"

    @property
    def needs_products(self) -> bool:
        return self.whitening in ("diagonal", "full")

    def foresee_bytes(self, columns: int) -> int:
        # The vectors, the product of the leading ones and what it leaves of the Gram matrix.
        return 4 * matrix_bytes.DOUBLE * columns * columns if self.anticipates else 0

    def fit_bytes(self, rows: int, columns: int, tokens: float) -> int:
        square, entries = matrix_bytes.DOUBLE * columns * columns, matrix_bytes.DOUBLE * rows * columns
        rank, full = self.rank.at_most(rows, columns), self.whitening == "full"
        if self.rank.known_ahead and matrix_flops.finds_range(rows, columns, rank, metric=full):
            # In float64: the residual, and behind a diagonal metric; or the mean Gram matrix, and the same damped.
            held = entries + (square if full else 0 if self.whitening == "none" else entries)
            return max(held + matrix_bytes.range_finder(rows, columns, rank, metric=full), entries + 2 * square * full)
        vectors = matrix_bytes.spectrum(rows, columns)
        # In float64: the residual; behind the metric; its spectrum.
        fitting = 2 * entries + max(vectors, entries)
        if self.whitening == "none":
            return entries + max(vectors, entries)
        if self.whitening != "full":
            return max(entries + square * (self.whitening == "diagonal"), fitting)
        # The mean Gram matrix, the same damped, its root.
        return max(entries + 2 * square + matrix_bytes.root(columns, tokens), square + fitting)

    def foresee_flops(self, rows: int, columns: int) -> Work:
        if not self.anticipates:
            return NOTHING
        rank = self.rank.at_most(rows, columns)
        return matrix_flops.eigh(columns) + product64(columns, rank, columns) + elementwise(2 * columns**2)

    def fit_flops(self, rows: int, columns: int, tokens: float) -> Work:
        entries, rank = rows * columns, self.rank.at_most(rows, columns)
        definite = self.damping > 0 or tokens >= columns if self.whitening == "full" else None
        found = matrix_flops.directions(rows, columns, rank if self.rank.known_ahead else None, definite=definite)
        # The check of the residual; the projection on the leading directions, both factors scaled.
        fitting = found + product64(rank, rows, columns) + elementwise(entries + rank * (rows + 2 * columns))
        if self.whitening == "none":
            return fitting
        # The check and the mean of the Gram matrix.
        metric = elementwise(2 * columns**2 if self.needs_products else 0)
        return fitting + metric + elementwise(0 if self.whitening == "full" else entries)
