"""Linear layers that share an input and a recipe: codes, branches, stores, and what became of the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.residual import Correction
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.batches import BATCH_BYTES, batch_size
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.aser import without_channels
from counterweight.workers.compensation.objective import energy, squared_errors
from counterweight.workers.compensation.regression import root_of, spectrum
from counterweight.workers.methods.compensations import NoCompensation
from counterweight.workers.quantization.inputs import one_batch
from counterweight.workers.quantization.result import Fallback, QuantizationResult
from counterweight.workers.recipe import ModuleRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """A linear on its way through the steps of its recipe.

    weight: [out, in] float32. statistics: of its input. scale_dtype, factor_dtype: in which scales and factors are stored.
    outliers: channels of the input that are taken out of the codes. codes: None before they are chosen. branch: what stands
    beside them. residual: what neither holds, to be fetched while decoding. fallbacks: departures from the recipe.
    """

    weight: Tensor
    statistics: InputStatistics
    scale_dtype: torch.dtype
    factor_dtype: torch.dtype
    outliers: Tensor | None = None
    codes: StoredWeight | None = None
    branch: LowRank | None = None
    residual: Correction | None = None
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def stored(self) -> StoredWeight:
        """The codes; ValueError before they are chosen."""
        if self.codes is None:
            raise ValueError("codes: none yet: expected a layer that has been quantized")
        return self.codes

    def left(self) -> Tensor:
        """What codes and branch leave of the weight, [out, in]."""
        error = self.weight - self.stored.dequantize()
        return error if self.branch is None else error - self.branch.product()

    def errors(self) -> tuple[float | None, float | None]:
        """E||W t - W' y - L x||^2 / E||W t||^2 over the calibration tokens, without and with the branch; None when no token
        reached the layer. ValueError where no products were gathered."""
        unit, plain, compensated = squared_errors(self.weight, self.stored.dequantize(), self.branch, self.statistics)
        if not unit > 0:
            return None, None
        return plain / unit, (plain if compensated is None else compensated) / unit

    def errors_on(self, x: Tensor, original: Tensor | None = None) -> tuple[float | None, float | None]:
        """The same over other tokens, given by rows. x: what enters the layer [tokens, in], of any float dtype; original: what
        enters it in the original model, None where that is x."""
        form, wide = self.statistics.activations, x.float()
        y = wide if form is None else fake_quantize_activations(x, form).float()
        wanted = (wide if original is None else original.float()) @ self.weight.T
        left = wanted - y @ self.stored.dequantize().T
        unit = float(wanted.square().sum(dtype=torch.float64))
        if unit == 0:
            return None, None
        plain = float(left.square().sum(dtype=torch.float64)) / unit
        if self.branch is None:
            return plain, plain
        left -= wide @ self.branch.product().T
        return plain, float(left.square().sum(dtype=torch.float64)) / unit


def solve(
    recipe: ModuleRecipe, layers: Sequence[LayerState], batch_bytes: int = BATCH_BYTES[False]
) -> list[LayerState]:
    """`layers`, which share `recipe` and dtypes, with codes (unless they have them), branch and store.

    Neighbours with the same statistics read one input: where rows are independent, their codes are chosen as one matrix's,
    because they share a Hessian. Several such matrices must have one shape: their codes are chosen in one batch, each with the
    bits that it gets alone. batch_bytes: that codes with their branches may take together. Raises ValueError as the methods do.
    """
    if recipe.compensation.joint:
        solved = _jointly(recipe, layers, batch_bytes)
    else:
        coded = _quantized(recipe, layers) if all(layer.codes is None for layer in layers) else layers
        solved = [_compensated(recipe, layer) for layer in coded]
    if recipe.residual is None:
        return solved
    return [replace(layer, residual=recipe.residual.store(layer.left(), layer.statistics)) for layer in solved]


def gains(recipe: ModuleRecipe, layers: Sequence[LayerState]) -> list[Tensor]:
    """How much of E||W t||^2 each further direction of a branch takes off the error, descending, [min(out, in)] float64 for
    each of `layers`: squared singular values of what the branch is fitted to, before anything is known of its rank.

    LRC: of W E[x' x'^T]^(1/2), what quantizing the input loses, which predicts its error (see `initial_branch`). Otherwise of
    the whitened error of codes that were made without a branch.
    """
    options = recipe.compensation
    ahead = [options.gain_problem(layer.weight.double(), layer.statistics) for layer in layers]
    problems = [problem for problem in ahead if problem is not None]
    if not problems:
        plain = recipe.model_copy(update={"compensation": NoCompensation(), "residual": None})
        root = root_of(layers[0].statistics.product("xx"))
        problems = [(layer.left().double(), root) for layer in solve(plain, layers)]
    found = []
    for layer, (matrix, root) in zip(layers, problems, strict=True):
        unit = energy(layer.weight.double(), layer.statistics)
        squares = spectrum(matrix @ root)[0].square()[: min(layer.weight.shape)]
        found.append(squares / unit if unit > 0 else torch.zeros_like(squares))
    return found


def _quantized(recipe: ModuleRecipe, layers: Sequence[LayerState]) -> list[LayerState]:
    """With codes, all of them chosen in one call."""
    by_input = [list(own) for _, own in groupby(layers, key=lambda layer: id(layer.statistics))]
    stacks = by_input if recipe.weights.rows_are_independent else [[layer] for layer in layers]
    targets = one_batch([_target(recipe, stack) for stack in stacks])
    metrics = [_metric(recipe, stack[0]) for stack in stacks]
    found = recipe.weights.quantize_batch(targets, metrics, scale_dtype=layers[0].scale_dtype)
    return [layer for stack, own in zip(stacks, found, strict=True) for layer in _with_codes(stack, own)]


def _target(recipe: ModuleRecipe, stack: Sequence[LayerState]) -> Tensor:
    """What the codes of layers that read one input are to reproduce, [sum of out, in]."""
    stacked = torch.cat([layer.weight for layer in stack])
    targets = recipe.weights.target(stacked, stack[0].statistics).split([layer.weight.shape[0] for layer in stack])
    return torch.cat([_without_outliers(layer, own) for layer, own in zip(stack, targets, strict=True)])


def _metric(recipe: ModuleRecipe, layer: LayerState) -> InputStatistics | None:
    """What the codes of a layer, and of those that share its input, pay for: what they do to the quantized input. None where
    they look at no input."""
    if not recipe.weights.looks_at_input:
        return None
    seen = InputStatistics(gram=layer.statistics.product("yy"), tokens=layer.statistics.tokens)
    return recipe.compensation.foresee(seen, layer.weight.shape[0])


def _with_codes(stack: Sequence[LayerState], found: QuantizationResult) -> list[LayerState]:
    """Each layer with its rows of the codes that were chosen for all."""
    sizes = [layer.weight.shape[0] for layer in stack]
    return [
        replace(
            layer,
            codes=found.weight.rows(slice(end - size, end)),
            fallbacks=(*layer.fallbacks, *found.fallbacks),
        )
        for layer, size, end in zip(stack, sizes, accumulate(sizes), strict=True)
    ]


def _without_outliers(layer: LayerState, target: Tensor) -> Tensor:
    return target if layer.outliers is None else without_channels(target, layer.outliers)


def _compensated(recipe: ModuleRecipe, layer: LayerState) -> LayerState:
    """With a branch for what the codes left."""
    fitted = recipe.compensation.fit(layer.left(), layer.statistics, taken=layer.outliers, dtype=layer.factor_dtype)
    return replace(layer, branch=fitted.low_rank, fallbacks=(*layer.fallbacks, *fitted.fallbacks))


def _jointly(recipe: ModuleRecipe, layers: Sequence[LayerState], batch_bytes: int) -> list[LayerState]:
    """With codes and branch that are fitted to each other, for layers of one shape."""
    first = layers[0]
    rows, columns = first.weight.shape
    fitted = recipe.compensation.solve(
        recipe.weights,
        [(layer.weight, layer.statistics) for layer in layers],
        scale_dtype=first.scale_dtype,
        factor_dtype=first.factor_dtype,
        at_once=batch_size(recipe, [(rows, columns)], batch_bytes),
    )
    return [
        replace(layer, codes=found.weight, branch=found.low_rank, fallbacks=found.fallbacks)
        for layer, found in zip(layers, fitted, strict=True)
    ]
