"""One sibling group of linear layers under its recipe: codes, branches, and what became of the error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats import LowRank, QuantizedWeight
from workers.calibration.statistics import InputStatistics
from workers.compensation import anticipate, compensate
from workers.compensation.aser import outlier_channels, without_channels
from workers.compensation.lrc import lrc, relative_error
from workers.quantization import quantize
from workers.quantization.result import Fallback
from workers.quantization.target import aimed
from workers.recipe import ASER, LRC, ModuleRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One linear. Errors are E||W t - W' y - L x||^2 / E||W t||^2 over the calibration tokens, without and with the branch;
    None when no token reached the layer."""

    weight: QuantizedWeight
    low_rank: LowRank | None
    error_quantized: float | None
    error_compensated: float | None
    fallbacks: tuple[Fallback, ...]


def shares_a_solve(recipe: ModuleRecipe) -> bool:
    """Whether siblings of different size may be solved as one matrix: rows are independent given the Hessian, but not where
    a branch enters the solve, because its rank depends on the number of rows."""
    return not recipe.compensation.anticipates and not isinstance(recipe.compensation, LRC)


def solve(
    recipe: ModuleRecipe,
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    siblings: Sequence[Tensor],
    *,
    scale_dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> list[Solution]:
    """Solutions of `weights`, each [out, in] float32, which read one input and share `recipe`.

    siblings: all weights that read that input, these among them. Raises ValueError as the solvers do.
    """
    if isinstance(recipe.compensation, LRC):
        return [
            _joint(recipe, recipe.compensation, weight, statistics, scale_dtype, factor_dtype) for weight in weights
        ]
    stacked = torch.cat(list(weights))
    # Codes pay for what they do to their own input, which is the quantized one.
    metric = InputStatistics(gram=statistics.product("yy"), tokens=statistics.tokens)
    target = aimed(recipe.weights.quantizer, stacked, statistics)
    if isinstance(recipe.compensation, ASER) and statistics.tokens:
        target = without_channels(target, outlier_channels(siblings, statistics, recipe.compensation))
    foreseen = anticipate(recipe.compensation, metric, weights[0].shape[0])
    quantized = quantize(recipe.weights.quantizer, target, foreseen, recipe.weights.format(), scale_dtype=scale_dtype)
    solutions = []
    for weight, part in zip(weights, _split(quantized.weight, weights), strict=True):
        fitted = compensate(recipe.compensation, weight - part.dequantize(), statistics, dtype=factor_dtype)
        fallbacks = (*quantized.fallbacks, *fitted.fallbacks)
        solutions.append(_judged(weight, part, fitted.low_rank, statistics, fallbacks))
    return solutions


def _joint(
    recipe: ModuleRecipe,
    options: LRC,
    weight: Tensor,
    statistics: InputStatistics,
    scale_dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> Solution:
    fitted = lrc(
        options,
        recipe.weights.quantizer,
        weight,
        statistics,
        recipe.weights.format(),
        scale_dtype=scale_dtype,
        factor_dtype=factor_dtype,
    )
    return _judged(weight, fitted.weight, fitted.low_rank, statistics, fitted.fallbacks)


def _judged(
    weight: Tensor,
    quantized: QuantizedWeight,
    branch: LowRank | None,
    statistics: InputStatistics,
    fallbacks: tuple[Fallback, ...],
) -> Solution:
    codes = quantized.dequantize()
    reached = bool((weight @ statistics.product("tt").to(weight.dtype)).any())
    return Solution(
        weight=quantized,
        low_rank=branch,
        error_quantized=relative_error(weight, codes, None, statistics) if reached else None,
        error_compensated=relative_error(weight, codes, branch, statistics) if reached else None,
        fallbacks=fallbacks,
    )


def _split(weight: QuantizedWeight, like: Sequence[Tensor]) -> Iterator[QuantizedWeight]:
    start = 0
    for part in like:
        rows = slice(start, start + part.shape[0])
        start = rows.stop
        yield QuantizedWeight(
            codes=weight.codes[rows].clone(),
            scale=weight.scale[rows].clone(),
            zero_point=None if weight.zero_point is None else weight.zero_point[rows].clone(),
            bits=weight.bits,
            group_size=weight.group_size,
        )
