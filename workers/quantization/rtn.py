"""Round to nearest: every weight to the grid value beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.quantization.inputs import checked_matrix, checked_statistics
from counterweight.workers.quantization.result import Fallback, QuantizationResult


def rtn(
    options: RTN, weight: Tensor, statistics: InputStatistics | None, format: WeightFormat, scale_dtype: torch.dtype
) -> QuantizationResult:
    """Codes of `weight` [out, in] on the searched grid.

    statistics: of the layer's input, [in]; None only when the scale search is not weighted. Without a token the
    search is unweighted, which the result records. Raises ValueError for a weight that is not a finite matrix, that
    groups do not tile, or whose scales do not fit `scale_dtype`.
    """
    matrix = checked_matrix("weight", weight)
    importance = None
    fallbacks: tuple[Fallback, ...] = ()
    if options.scale.looks_at_importance:
        gram = checked_statistics(statistics, matrix.shape[1]).mean_gram()
        importance = gram.diagonal().float()
        if not bool((importance > 0).any()):
            importance = None
            fallbacks = (Fallback(step="rtn.scale", cause="no calibration token arrived: unweighted scales"),)
    grid = options.scale.fit(matrix, format, scale_dtype, importance)
    return QuantizationResult(weight=grid.round(matrix), fallbacks=fallbacks)
