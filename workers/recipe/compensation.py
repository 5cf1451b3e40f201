"""What a manifest can ask to be put back. Options only, without torch: `workers/compensation` computes with them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers.config import Method
from counterweight.workers.recipe.rank import BudgetRank, CountRank, EnergyRank, FractionRank, Rank


class _Compensation(Method):
    """What every compensation answers."""

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a layer [rows, columns] cannot have it, or None when it can."""
        del rows, columns
        return None

    @property
    def anticipates(self) -> bool:
        """Whether the quantizer is told of what will follow: see `workers.compensation.anticipate`."""
        return False

    @property
    def needs_magnitudes(self) -> bool:
        """Whether sum |x| must be gathered."""
        return False


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


Compensation = Annotated[NoCompensation | SVD | ASER | LRC, Field(discriminator="kind")]
"""How the error of quantization is compensated."""
