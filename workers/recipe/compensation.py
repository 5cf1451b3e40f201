"""What a manifest can ask to be put back. Options only, without torch: `workers/compensation` computes with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from workers.config import Config
from workers.recipe.rank import EnergyRank, FractionRank, Rank


class NoCompensation(Config):
    """Nothing is put back."""

    kind: Literal["none"] = "none"

    def problem(self, rows: int, columns: int) -> str | None:
        """None: always possible."""
        del rows, columns
        return None

    @property
    def anticipates(self) -> bool:
        """Never."""
        return False


class SVD(Config):
    """Truncated singular value decomposition of the (whitened) residual."""

    kind: Literal["svd"] = "svd"
    rank: Rank = Field(default_factory=lambda: FractionRank(fraction=0.1))
    """Rank of the branch."""
    whitening: Literal["none", "diagonal", "full"] = "full"
    """The metric: none, the plain residual; diagonal, each input channel by its E[x^2]; full, the layer's output error on
    the calibration tokens."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mean of E[x^2] that is added to each channel's: how much to trust directions that calibration saw
    little of."""

    anticipation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the quantizer leaves to the branch what the branch can do. 0: it minimizes its own error. 1: errors along
    the strongest directions of the input, as many as the branch has ranks, cost it nothing. Needs full whitening and a
    rank that is known in advance. The higher, the smaller the error with the branch and the larger without it."""

    @model_validator(mode="after")
    def _anticipates_what_it_does(self) -> SVD:
        if self.anticipation and (self.whitening != "full" or isinstance(self.rank, EnergyRank)):
            raise ValueError("anticipation: expected 0 unless whitening is full and rank is a fraction or a count")
        return self

    def problem(self, rows: int, columns: int) -> str | None:
        """Why a layer [rows, columns] cannot have such a branch, or None when it can."""
        return self.rank.problem(rows, columns)

    @property
    def anticipates(self) -> bool:
        """Whether `anticipate` changes the statistics."""
        return self.anticipation > 0


Compensation = Annotated[NoCompensation | SVD, Field(discriminator="kind")]
"""How the error of quantization is compensated."""
