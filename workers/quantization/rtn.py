"""Round to nearest: every weight to the grid value beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.quantization.inputs import checked_matrices, checked_statistics
from counterweight.workers.quantization.result import Fallback, QuantizationResult


def rtn(
    options: RTN,
    weights: Tensor,
    statistics: Sequence[InputStatistics | None],
    format: WeightFormat,
    scale_dtype: torch.dtype,
) -> list[QuantizationResult]:
    """Codes of each of `weights` [batch, out, in] on the searched grid.

    statistics: of each one's own input; None only when the scale search is not weighted. Without a token the search is
    unweighted, which the result records. Raises ValueError for a weight that is not a finite matrix, that groups do not
    tile, or whose scales do not fit `scale_dtype`.
    """
    matrices = checked_matrices("weight", weights)
    importance = None
    fallbacks: list[tuple[Fallback, ...]] = [()] * len(matrices)
    if options.scale.looks_at_importance:
        powers = [checked_statistics(seen, matrices.shape[2]).mean_gram().diagonal().float() for seen in statistics]
        for place, power in enumerate(powers):
            if not bool((power > 0).any()):
                powers[place] = torch.ones_like(power)
                fallbacks[place] = (
                    Fallback(step="rtn.scale", cause="no calibration token arrived: unweighted scales"),
                )
        importance = torch.stack(powers)
    grids = options.scale.fit(matrices, format, scale_dtype, importance).unbind()
    return [
        QuantizationResult(weight=grid.round(matrix), fallbacks=why)
        for matrix, grid, why in zip(matrices, grids, fallbacks, strict=True)
    ]
