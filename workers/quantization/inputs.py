"""What every solver may rely on: a finite matrix, and finite statistics of its own input."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.calibration.statistics import InputStatistics


def checked_weight(weight: Tensor) -> Tensor:
    """`weight` in float32; ValueError unless it is a finite matrix with at least one row and one column."""
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"weight: {weight.dtype} {list(weight.shape)}: expected a floating-point matrix [out, in]")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: holds NaN or infinity: expected finite values")
    return weight.float()


def checked_statistics(statistics: InputStatistics | None, weight: Tensor) -> InputStatistics:
    """`statistics` when they are finite and of the input of `weight`; ValueError otherwise."""
    if statistics is None:
        raise ValueError("statistics: none: this algorithm needs those of the layer's input")
    if statistics.width != weight.shape[1]:
        raise ValueError(f"statistics: width {statistics.width}: expected {weight.shape[1]}, the weight's input columns")
    if not bool(torch.isfinite(statistics.gram).all()):
        raise ValueError("statistics: the Gram matrix holds NaN or infinity: expected finite values")
    return statistics
