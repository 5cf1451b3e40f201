"""Weights to integer codes: the uniform grid, and the algorithms that choose codes on it."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.quantization.gptq import gptq
from counterweight.workers.quantization.grid import Grid, fit
from counterweight.workers.quantization.result import Fallback, QuantizationResult
from counterweight.workers.quantization.rtn import rtn
from counterweight.workers.recipe.weights import RTN, Quantizer, WeightFormat

__all__ = ["Fallback", "Grid", "QuantizationResult", "fit", "quantize"]


def quantize(
    options: Quantizer,
    weight: Tensor,
    statistics: InputStatistics | None,
    format: WeightFormat,
    *,
    scale_dtype: torch.dtype,
) -> QuantizationResult:
    """Codes of `weight` [out, in] as `options` ask. Arguments and errors: see `gptq` and `rtn`."""
    if isinstance(options, RTN):
        return rtn(options, weight, statistics, format, scale_dtype)
    return gptq(options, weight, statistics, format, scale_dtype)
