"""What is put back: closed-form low-rank branches for the error that quantization leaves."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from workers.compensation.none import NoCompensation
from workers.compensation.rank import CountRank, EnergyRank, FractionRank, Rank
from workers.compensation.result import CompensationResult
from workers.compensation.svd import SVD

Compensation = Annotated[NoCompensation | SVD, Field(discriminator="kind")]
"""How the error of quantization is compensated."""

__all__ = [
    "SVD",
    "Compensation",
    "CompensationResult",
    "CountRank",
    "EnergyRank",
    "FractionRank",
    "NoCompensation",
    "Rank",
]
