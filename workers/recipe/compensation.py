"""What a manifest can ask to be put back. Options only, without torch: `workers/compensation` computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Method
from counterweight.workers.recipe.rank import BudgetRank, CountRank, EnergyRank, FractionRank, Rank

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.compensation.aser import TakenOut
    from counterweight.workers.compensation.lrc import LRCResult
    from counterweight.workers.compensation.result import CompensationResult
    from counterweight.workers.methods.stored import StoredWeights


class _Compensation(Method):
    """What every compensation answers; nothing, for one that does nothing."""

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a layer [rows, columns] cannot have it, or None when it can."""
        del rows, columns
        return None

    @property
    def anticipates(self) -> bool:
        """Whether the quantizer is told of what will follow: see `foresee`."""
        return False

    @property
    def needs_magnitudes(self) -> bool:
        """Whether sum |x| must be gathered."""
        return False

    @property
    def needs_rows(self) -> bool:
        """Whether it looks at rows of the input before statistics are gathered: see `take_out`."""
        return False

    @property
    def joint(self) -> bool:
        """Whether codes and branch are fitted to each other: see `solve`."""
        return False

    @property
    def of_finished_codes(self) -> bool:
        """Whether it can follow codes that something else has chosen."""
        return True

    @property
    def branch_rank(self) -> Rank | None:
        """How the rank of its branch is asked for; None without a branch."""
        return None

    @property
    def branch_bits(self) -> int | None:
        """Bits of the branch's factors; None for those of the source's dtype."""
        return None

    def gathers(self) -> dict[str, object]:
        """What calibration looks at: two compensations with equal values can follow the same statistics."""
        return self.model_dump(mode="json") if self.needs_rows else {"magnitudes": self.needs_magnitudes}

    def with_rank(self, count: int) -> Compensation:
        """The same with a branch of this rank; nothing for 0."""
        del count
        return NoCompensation()

    def take_out(self, weights: Sequence[Tensor], magnitude: Tensor) -> TakenOut | None:
        """Channels of the input to take out of the codes. weights: [out, in] that read it; magnitude: E|x| [in] float64."""
        del weights, magnitude
        return None

    def foresee(self, statistics: InputStatistics, rows: int) -> InputStatistics:
        """The statistics with which to quantize a layer of `rows` outputs that this will follow."""
        del rows
        return statistics

    def fit(self, residual: Tensor, statistics: InputStatistics | None, *, dtype: torch.dtype) -> CompensationResult:
        """The branch for `residual` [out, in] = W - Q, with factors stored in `dtype`."""
        from counterweight.workers.compensation.result import CompensationResult

        del statistics, dtype
        return CompensationResult(low_rank=None, captured=0.0, singular_values=residual.new_zeros(0).double())

    def gain_problem(self, weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor] | None:
        """A matrix [out, in] and a root [in, in] of a metric, float64, whose product's squared singular values say what each
        rank of the branch wins of `weight` [out, in] float64, before there are codes; None where codes are needed for it."""
        del weight, statistics
        return None

    def solve(
        self,
        weights: StoredWeights,
        weight: Tensor,
        statistics: InputStatistics,
        *,
        scale_dtype: torch.dtype,
        factor_dtype: torch.dtype,
    ) -> LRCResult:
        """Codes and branch of `weight` [out, in] float32 where they are `joint`; TypeError elsewhere."""
        raise TypeError(f"{type(self).__name__}: expected a compensation that is joint")

    def foresee_bytes(self, columns: int) -> int:
        """Memory of `foresee` at its peak, beside the statistics that it is given; a quarter of it stays."""
        del columns
        return 0

    def fit_bytes(self, rows: int, columns: int, tokens: float) -> int:
        """Memory of `fit` at its peak, beside the residual [rows, columns] float32. tokens: that calibration has seen."""
        del rows, columns, tokens
        return 0

    def solve_bytes(self, weights: StoredWeights, rows: int, columns: int, tokens: float) -> int:
        """Memory of `solve` at its peak, beside a weight [rows, columns] float32, where codes and branch are `joint`."""
        del weights, rows, columns, tokens
        return 0


class NoCompensation(_Compensation):
    """Nothing is put back."""

    VERSION: ClassVar[int] = 1

    kind: Literal["none"] = "none"


class _Branch(_Compensation):
    """A low-rank branch."""

    rank: Rank = Field(default_factory=lambda: FractionRank(fraction=0.1))
    """Rank of the branch."""
    factor_bits: Literal[8] | None = None
    """Bits of the branch's factors; null: the source's 16 or 32, as PEFT wants them."""

    def problem(self, rows: int, columns: int) -> str | None:
        return self.rank.problem(rows, columns)

    @property
    def branch_rank(self) -> Rank | None:
        return self.rank

    @property
    def branch_bits(self) -> int | None:
        return self.factor_bits

    def with_rank(self, count: int) -> Compensation:
        if count == 0:
            return NoCompensation()
        found: Compensation = self.model_copy(update={"rank": CountRank(count=count)})  # type: ignore[assignment]
        return found


class SVD(_Branch):
    """Truncated singular value decomposition of the (whitened) residual."""

    VERSION: ClassVar[int] = 1

    kind: Literal["svd"] = "svd"
    whitening: Literal["none", "magnitude", "diagonal", "full"] = "full"
    """The metric: none, the plain residual (LoRC); magnitude, each input channel by its E|x| (L2QER); diagonal, by the root of
    its E[x^2] (QERA-approx); full, the layer's output error on the calibration tokens (QERA-exact, EoRA)."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mean of E[x^2] that is added to each channel's: how much to trust directions that calibration saw
    little of."""

    anticipation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the quantizer leaves to the branch what the branch can do. 0: it minimizes its own error. 1: errors along
    the strongest directions of the input, as many as the branch has ranks, cost it nothing. Needs full whitening and a
    rank that is known in advance. The higher, the smaller the error with the branch and the larger without it."""

    @model_validator(mode="after")
    def _anticipates_what_it_does(self) -> SVD:
        if self.anticipation and (self.whitening != "full" or isinstance(self.rank, EnergyRank | BudgetRank)):
            raise ValueError("anticipation: expected 0 unless whitening is full and rank is a fraction or a count")
        return self

    @property
    def anticipates(self) -> bool:
        return self.anticipation > 0

    def foresee(self, statistics: InputStatistics, rows: int) -> InputStatistics:
        from counterweight.workers.compensation.svd import deflated

        return deflated(self, statistics, rows)

    def fit(self, residual: Tensor, statistics: InputStatistics | None, *, dtype: torch.dtype) -> CompensationResult:
        from counterweight.workers.compensation.svd import svd

        return svd(self, residual, statistics, dtype)

    def foresee_bytes(self, columns: int) -> int:
        # The vectors, the product of the leading ones and what it leaves of the Gram matrix.
        return 4 * matrix_bytes.DOUBLE * columns * columns if self.anticipates else 0

    def fit_bytes(self, rows: int, columns: int, tokens: float) -> int:
        square, entries = matrix_bytes.DOUBLE * columns * columns, matrix_bytes.DOUBLE * rows * columns
        vectors = matrix_bytes.spectrum(rows, columns)
        # In float64: the residual; behind the metric; its spectrum, or what the branch leaves of it.
        fitting = 2 * entries + max(vectors, 2 * entries + matrix_bytes.DOUBLE * min(rows, columns) ** 2)
        if self.whitening == "none":
            return max(entries + vectors, 4 * entries)
        if self.whitening != "full":
            return max(entries + square, fitting)
        # The mean Gram matrix, the same damped, its root.
        return max(entries + 2 * square + matrix_bytes.root(columns, tokens), square + fitting)

    @property
    def needs_magnitudes(self) -> bool:
        return self.whitening == "magnitude"


class LRC(_Branch):
    """Low-rank correction on the unquantized input, fitted jointly with the codes (Scetbon & Hensman 2024).

    The branch first takes the directions of the weight that see most of what quantizing the input loses; the codes follow
    (`weights.quantizer.target` says what they aim at), and the branch is fitted again to what they leave.
    """

    VERSION: ClassVar[int] = 1

    kind: Literal["lrc"] = "lrc"
    iterations: Annotated[int, Field(strict=True, ge=1, le=20)] = 1
    """How often codes and branch are fitted to each other."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the mean of E[x^2] (E[y^2] of the quantized input) that is added to each channel's."""
    refit: Literal["joint", "weight"] = "joint"
    """What the branch is fitted to once there are codes. joint: the whole output error, that of the quantized input included
    (Update-LR). weight: the error of the weight alone, as whitened SVD; it cannot shrink the output."""

    @property
    def joint(self) -> bool:
        return True

    @property
    def of_finished_codes(self) -> bool:
        return False

    def gain_problem(self, weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor] | None:
        from counterweight.workers.compensation.lrc import initial_problem

        return initial_problem(weight, statistics, self.damping)

    def solve(
        self,
        weights: StoredWeights,
        weight: Tensor,
        statistics: InputStatistics,
        *,
        scale_dtype: torch.dtype,
        factor_dtype: torch.dtype,
    ) -> LRCResult:
        from counterweight.workers.compensation.lrc import lrc

        return lrc(self, weights, weight, statistics, scale_dtype=scale_dtype, factor_dtype=factor_dtype)

    def solve_bytes(self, weights: StoredWeights, rows: int, columns: int, tokens: float) -> int:
        square, entries = matrix_bytes.DOUBLE * columns * columns, matrix_bytes.DOUBLE * rows * columns
        vectors = matrix_bytes.spectrum(rows, columns)
        # Of the input, what its quantization loses: the prediction, the rest, and the same made symmetric; and its root.
        rest = max(matrix_bytes.right_divide(columns, columns), 4 * square)
        initial = max(rest, square + matrix_bytes.root(columns, tokens))
        # The weight in float64, behind a root of the metric.
        directions = square + entries + vectors
        # The target, in float64 and in float32.
        held = entries + matrix_bytes.SINGLE * rows * columns
        # The codes before, in a further iteration.
        again = entries if self.iterations > 1 else 0
        quantizing = held + again + max(weights.target_bytes(rows, columns), weights.quantize_bytes(rows, columns))
        # Codes and branch read back and turned round, and the trace of their product with the statistics.
        judging = held + 5 * entries
        # What the codes leave: the products, their regression, its root.
        refitting = held + again + 2 * entries + max(matrix_bytes.right_divide(rows, columns), directions)
        return entries + max(initial, directions, quantizing, judging, refitting)


class ASER(_Branch):
    """Error reconstruction by whitened SVD, with the outlier channels taken out of the codes (Zhao et al. 2024).

    The `outliers` input channels that are large in both activations and weights are scaled down where the norm or the layer
    before can do it, their columns of the weight go to the branch whole, and codes are made of the rest.
    """

    VERSION: ClassVar[int] = 1

    kind: Literal["aser"] = "aser"
    rank: Rank = Field(default_factory=lambda: CountRank(count=64))
    """Rank of the branch; the columns that were taken out need up to `outliers` of it."""
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

    @property
    def needs_rows(self) -> bool:
        return True

    @property
    def of_finished_codes(self) -> bool:
        return self.outliers == 0

    def take_out(self, weights: Sequence[Tensor], magnitude: Tensor) -> TakenOut | None:
        from counterweight.workers.compensation.aser import TakenOut, outlier_channels, outlier_scales

        if not self.outliers:
            return None
        channels = outlier_channels(weights, magnitude, self)
        scales = outlier_scales(magnitude, channels, self) if self.smoothing else None
        return TakenOut(channels=channels, scales=scales)

    def fit(self, residual: Tensor, statistics: InputStatistics | None, *, dtype: torch.dtype) -> CompensationResult:
        plain = SVD(rank=self.rank, damping=self.damping, factor_bits=self.factor_bits)
        return plain.fit(residual, statistics, dtype=dtype)

    def fit_bytes(self, rows: int, columns: int, tokens: float) -> int:
        return SVD(rank=self.rank, damping=self.damping).fit_bytes(rows, columns, tokens)


Compensation = Annotated[NoCompensation | SVD | ASER | LRC, Field(discriminator="kind")]
"""How the error of quantization is compensated."""
