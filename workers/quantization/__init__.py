"""Weights to integer codes: the uniform grid, and the algorithms that choose codes on it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from workers.quantization.gptq import GPTQ
from workers.quantization.grid import AbsoluteMaximum, Grid, MeanSquare, ScaleSearch, WeightFormat
from workers.quantization.result import Fallback, QuantizationResult
from workers.quantization.rtn import RTN

Quantizer = Annotated[RTN | GPTQ, Field(discriminator="kind")]
"""How codes are chosen."""

__all__ = [
    "GPTQ",
    "RTN",
    "AbsoluteMaximum",
    "Fallback",
    "Grid",
    "MeanSquare",
    "QuantizationResult",
    "Quantizer",
    "ScaleSearch",
    "WeightFormat",
]
