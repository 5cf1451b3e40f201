"""What is put back: closed-form low-rank branches for the error that quantization leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.result import CompensationResult
from counterweight.workers.compensation.svd import deflated, svd
from counterweight.workers.recipe.compensation import ASER, SVD, Compensation

__all__ = ["CompensationResult", "anticipate", "compensate"]


def anticipate(options: Compensation, statistics: InputStatistics, rows: int) -> InputStatistics:
    """The statistics with which to quantize a layer of `rows` outputs, when this compensation will follow."""
    return deflated(options, statistics, rows) if isinstance(options, SVD) and options.anticipates else statistics


def compensate(
    options: Compensation, residual: Tensor, statistics: InputStatistics | None, *, dtype: torch.dtype
) -> CompensationResult:
    """The branch for `residual` [out, in] = W - Q that `options` ask for, factors stored in `dtype`; see `svd`."""
    if isinstance(options, ASER):
        options = SVD(rank=options.rank, damping=options.damping, factor_bits=options.factor_bits)
    if isinstance(options, SVD):
        return svd(options, residual, statistics, dtype)
    return CompensationResult(low_rank=None, captured=0.0, singular_values=residual.new_zeros(0, dtype=torch.float64))
