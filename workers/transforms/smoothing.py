"""Smoothing: input channels divided by scales that the module before takes in, and the weights that read them multiplied.

A norm's weight, the rows of the linear before down_proj, the rows of the values before o_proj (where every query head has its
own) can take a scale in; the function of the block stays as it was. SmoothQuant (Xiao et al. 2022), AWQ (Lin et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.methods.transforms.smoothing import STRENGTHS, Smoothing
from counterweight.workers.models.family import ModelFamily, SharedInputGroup

NOTHING: Mapping[str, Hadamard] = {}


def producer_rows(
    family: ModelFamily, group: SharedInputGroup, parameters: Mapping[str, Tensor], heads: int
) -> tuple[str, slice | list[int]] | None:
    """The parameter, and which of its elements or rows, that can take the scales of a group's input in; None when there is
    none. heads: attention's, of queries."""
    return family.producer_rows(group, {name: tuple(value.shape) for name, value in parameters.items()}, heads)


def fold(
    family: ModelFamily,
    scales: Mapping[SharedInputGroup, Tensor],
    parameters: Mapping[str, Tensor],
    online: Mapping[str, Hadamard] = NOTHING,
    *,
    heads: int,
) -> dict[str, Tensor]:
    """The block's parameters, float32, with each group's input divided by its scales [in]; ValueError for a group whose
    input nothing can scale.

    heads: attention's, of queries.
    online: linears whose input is transformed at inference, which their weights have taken in: scales come before that.
    """
    folded = {name: value.float() for name, value in parameters.items()}
    for group, scale in scales.items():
        place = producer_rows(family, group, parameters, heads)
        if place is None:
            raise ValueError(f"{group[0]}: nothing before it can take scales in")
        name, rows = place
        scale = scale.to(folded[name])
        value = folded[name].clone()
        if value.ndim == 1:
            value = (value + family.norm_offset) / scale - family.norm_offset
        else:
            value[rows] /= scale.unsqueeze(1)
        folded[name] = value
        bias = name.removesuffix(".weight") + ".bias"
        if bias in folded:
            changed = folded[bias].clone()
            changed[rows] /= scale
            folded[bias] = changed
        for module in group:
            folded[f"{module}.weight"] = scaled(folded[f"{module}.weight"], scale, online.get(module))
    return folded


def migration_scales(
    options: Smoothing,
    weights: Sequence[Tensor],
    rows: Tensor,
    nearest: Callable[[Tensor], Tensor],
    activations: ActivationFormat | None,
    transform: Hadamard | None = None,
) -> Tensor:
    """The scales [in] float64 of one input. weights: all [out, in] that read it; rows: [tokens, in] of it; both as they are
    quantized, which is behind `transform` when there is one. nearest: a weight as it is stored (`StoredWeights.nearest`)."""
    stacked, x = (before(value.float(), transform) for value in (torch.cat(list(weights)), rows))
    magnitude, size = x.abs().mean(0).double(), stacked.abs().mean(0).double()
    strengths = STRENGTHS if options.strength == "search" else (options.strength,)
    candidates = [_scales(magnitude, size, strength) for strength in strengths]
    if len(candidates) == 1:
        return candidates[0]
    exact = x @ stacked.T
    errors = [_error(stacked, x, exact, scale.float(), nearest, activations, transform) for scale in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _scales(magnitude: Tensor, size: Tensor, strength: float) -> Tensor:
    if strength == 0:
        return torch.ones_like(magnitude)
    floor = torch.finfo(torch.float32).tiny
    log = strength * magnitude.clamp_min(floor).log() - (1 - strength) * size.clamp_min(floor).log()
    # A channel that is never used, on either side, stays as it is.
    used = (magnitude > 0) & (size > 0)
    log = torch.where(used, log - log[used].mean(), 0.0) if bool(used.any()) else torch.zeros_like(log)
    return log.clamp(-10, 10).exp()


def scaled(weight: Tensor, scale: Tensor, transform: Hadamard | None) -> Tensor:
    """A weight [out, in] whose input is divided by `scale` [in] before `transform`."""
    return after(before(weight, transform) * scale, transform)


def before(rows: Tensor, transform: Hadamard | None) -> Tensor:
    """rows [..., in] as they were before `transform`."""
    return rows if transform is None else rows @ transform.dense().T.to(rows)


def after(rows: Tensor, transform: Hadamard | None) -> Tensor:
    """rows [..., in] behind `transform`."""
    return rows if transform is None else transform.apply(rows)


def _error(
    weight: Tensor,
    x: Tensor,
    exact: Tensor,
    scale: Tensor,
    nearest: Callable[[Tensor], Tensor],
    activations: ActivationFormat | None,
    transform: Hadamard | None,
) -> float:
    """Squared output error of rounding weight and input after scaling, behind `transform`."""
    target = after(weight * scale, transform)
    rounded = nearest(target)
    seen = after(x / scale, transform)
    if activations is not None:
        seen = fake_quantize_activations(seen, activations)
    return float((seen @ rounded.T - exact).square().sum(dtype=torch.float64))
