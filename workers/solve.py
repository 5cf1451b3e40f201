"""One sibling group of linear layers under its recipe: codes, branches, and what became of the error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.residual import Correction
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.aser import without_channels
from counterweight.workers.compensation.lrc import energy, squared_error
from counterweight.workers.compensation.regression import root_of, spectrum
from counterweight.workers.methods.compensations import NoCompensation
from counterweight.workers.quantization.result import Fallback
from counterweight.workers.recipe import ModuleRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One linear. Errors are E||W t - W' y - L x||^2 / E||W t||^2 over the calibration tokens, without and with the branch;
    None when no token reached the layer. residual: what neither holds, to be fetched while decoding."""

    weight: StoredWeight
    low_rank: LowRank | None
    error_quantized: float | None
    error_compensated: float | None
    fallbacks: tuple[Fallback, ...]
    residual: Correction | None = None


def shares_a_solve(recipe: ModuleRecipe) -> bool:
    """Whether linears of different size that share an input may be solved as one matrix: not where a branch enters the solve,
    because its rank depends on the number of rows."""
    return not recipe.compensation.anticipates and not recipe.compensation.joint


def solve(
    recipe: ModuleRecipe,
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    outliers: Tensor | None = None,
    codes: Sequence[StoredWeight] | None = None,
    *,
    scale_dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> list[Solution]:
    """Solutions of `weights`, each [out, in] float32, which read one input and share `recipe`.

    outliers: channels of the input that ASER takes out of the codes. codes: of each weight, when they are chosen already.
    Raises ValueError as the solvers do.
    """
    if recipe.compensation.joint:
        return [_joint(recipe, weight, statistics, scale_dtype, factor_dtype) for weight in weights]
    if codes is not None:
        return [
            _compensated(recipe, weight, part, statistics, factor_dtype, ())
            for weight, part in zip(weights, codes, strict=True)
        ]
    stacked = torch.cat(list(weights))
    # Codes pay for what they do to their own input, which is the quantized one.
    metric = InputStatistics(gram=statistics.product("yy"), tokens=statistics.tokens)
    target = recipe.weights.target(stacked, statistics)
    if outliers is not None:
        target = without_channels(target, outliers)
    foreseen = recipe.compensation.foresee(metric, weights[0].shape[0])
    quantized = recipe.weights.quantize(target, foreseen, scale_dtype=scale_dtype)
    parts = _split(quantized.weight, weights)
    return [
        _compensated(recipe, weight, part, statistics, factor_dtype, quantized.fallbacks)
        for weight, part in zip(weights, parts, strict=True)
    ]


def gains(
    recipe: ModuleRecipe,
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    outliers: Tensor | None = None,
    *,
    scale_dtype: torch.dtype,
) -> list[Tensor]:
    """How much of E||W t||^2 each further direction of a branch takes off the error, descending, [min(out, in)] float64 for
    each of `weights`: squared singular values of what the branch is fitted to, before anything is known of its rank.

    LRC: of W E[x' x'^T]^(1/2), what quantizing the input loses, which predicts its error (see `initial_branch`). Otherwise of
    the whitened error of codes that were made without a branch.
    """
    options = recipe.compensation
    ahead = [options.gain_problem(weight.double(), statistics) for weight in weights]
    problems = [problem for problem in ahead if problem is not None]
    if not problems:
        plain = recipe.model_copy(update={"compensation": NoCompensation(), "residual": None})
        solved = solve(plain, weights, statistics, outliers, scale_dtype=scale_dtype, factor_dtype=torch.float32)
        root = root_of(statistics.gram)
        left = [weight - part.weight.dequantize() for weight, part in zip(weights, solved, strict=True)]
        problems = [(error.double(), root) for error in left]
    found = []
    for weight, (matrix, root) in zip(weights, problems, strict=True):
        unit = energy(weight.double(), statistics)
        squares = spectrum(matrix @ root)[0].square()[: min(weight.shape)]
        found.append(squares / unit if unit > 0 else torch.zeros_like(squares))
    return found


def _compensated(
    recipe: ModuleRecipe,
    weight: Tensor,
    codes: StoredWeight,
    statistics: InputStatistics,
    factor_dtype: torch.dtype,
    fallbacks: tuple[Fallback, ...],
) -> Solution:
    fitted = recipe.compensation.fit(weight - codes.dequantize(), statistics, dtype=factor_dtype)
    return _judged(recipe, weight, codes, fitted.low_rank, statistics, (*fallbacks, *fitted.fallbacks))


def _joint(
    recipe: ModuleRecipe,
    weight: Tensor,
    statistics: InputStatistics,
    scale_dtype: torch.dtype,
    factor_dtype: torch.dtype,
) -> Solution:
    fitted = recipe.compensation.solve(
        recipe.weights, weight, statistics, scale_dtype=scale_dtype, factor_dtype=factor_dtype
    )
    return _judged(recipe, weight, fitted.weight, fitted.low_rank, statistics, fitted.fallbacks)


def _judged(
    recipe: ModuleRecipe,
    weight: Tensor,
    quantized: StoredWeight,
    branch: LowRank | None,
    statistics: InputStatistics,
    fallbacks: tuple[Fallback, ...],
) -> Solution:
    codes = quantized.dequantize()
    unit = energy(weight, statistics)

    def relative(part: LowRank | None) -> float | None:
        return squared_error(weight, codes, part, statistics) / unit if unit > 0 else None

    error = relative(None)
    left = weight - codes if branch is None else weight - codes - branch.product()
    return Solution(
        weight=quantized,
        low_rank=branch,
        error_quantized=error,
        error_compensated=error if branch is None else relative(branch),
        fallbacks=fallbacks,
        residual=None if recipe.residual is None else recipe.residual.store(left, statistics),
    )


def _split(weight: StoredWeight, like: Sequence[Tensor]) -> Iterator[StoredWeight]:
    """The rows of a stacked weight that belong to each of `like`."""
    start = 0
    for part in like:
        yield weight.rows(slice(start, start + part.shape[0]))
        start += part.shape[0]
