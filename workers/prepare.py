"""What is decided about a block from its first calibration tokens, before its statistics are gathered.

Scales that smooth inputs, channels that ASER takes out, clips of quantized activations: choices that need rows of the input
and not its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.calibration.clipping import activation_format, best_clip
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.compensation.aser import TakenOut
from counterweight.workers.hooks import input_hooks
from counterweight.workers.methods.activations import Activations
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.family import ModelFamily, SharedInputGroup
from counterweight.workers.quantization.inputs import check_activations
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.transforms.smoothing import after, before, producer_rows, scaled

ROWS = 2048
"""Tokens that choices are made on; fewer than 1,024 of them where every candidate is tried in a product with the weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """gatherings: what to gather of each group's input. scales: by what its input is to be divided before that, [in].
    outliers: linear -> channels of its input that ASER takes out of its codes."""

    gatherings: Mapping[SharedInputGroup, Gathering]
    scales: Mapping[SharedInputGroup, Tensor] = field(default_factory=dict)
    outliers: Mapping[str, Tensor] = field(default_factory=dict)


def prepare(
    block: Block,
    recipes: Mapping[str, ModuleRecipe],
    parameters: Mapping[str, Tensor],
    family: ModelFamily,
    online: Mapping[str, Hadamard],
    load: Callable[[], Tensor],
    *,
    judged: bool,
) -> Preparation:
    """Choices for every group of linears that share an input. A group takes the options of its first member that has a recipe,
    but for the channels that ASER takes out: a linear's branch gives back its own.

    parameters: the block's, names relative to it. online: linears whose input is transformed at inference. load: the first
    shard of the block's input, read only where a choice needs it. judged: whether errors are measured on tokens that nothing is
    solved on; otherwise they follow from second moments, which are then gathered of every input.
    """
    groups = {
        group: {name: recipes[name] for name in group if name in recipes}
        for group in block.groups
        if any(name in recipes for name in group)
    }
    curious = [group for group, own in groups.items() if any(_needs_rows(recipe) for recipe in own.values())]
    rows = _captured(block, curious, load) if curious else {}
    scales: dict[SharedInputGroup, Tensor] = {}
    outliers: dict[str, Tensor] = {}
    gatherings: dict[SharedInputGroup, Gathering] = {}
    for group, own in groups.items():
        recipe = next(iter(own.values()))
        seen = rows.get(group)
        foldable = producer_rows(family, group, parameters, block.heads) is not None
        transform = online.get(group[0])
        # Parameters lie on the CPU, rows where the block runs.
        weights = [] if seen is None else [parameters[f"{name}.weight"].float().to(seen.device) for name in group]
        if seen is not None and recipe.smoothing is not None and foldable:
            asked = None if recipe.activations is None else activation_format(recipe.activations)
            few = seen[:: max(1, len(seen) // 512)]
            scales[group] = recipe.smoothing.scales(weights, few, recipe.weights.nearest, asked, transform)
            scale = scales[group].float()
            seen = after(before(seen, transform) / scale, transform)
            weights = [scaled(weight, scale, transform) for weight in weights]
        if seen is not None:
            magnitude = seen.abs().double().mean(0)
            taken = {
                name: part.compensation.take_out(weights, magnitude, len(parameters[f"{name}.weight"]))
                for name, part in own.items()
            }
            outliers |= {name: found.channels for name, found in taken.items() if found is not None}
            found = _scales(taken.values())
            # Behind a transform there are no outlier channels left to scale.
            if found is not None and foldable and transform is None:
                scales[group] = scales.get(group, torch.ones_like(found)) * found
                seen = seen / found.float()
        gatherings[group] = _gathering(list(own.values()), recipe.activations, seen, judged=judged)
    return Preparation(gatherings=gatherings, scales=scales, outliers=outliers)


def _scales(taken: Iterable[TakenOut | None]) -> Tensor | None:
    """By what the input of linears is divided, [in] float64, given what each takes out of its codes. Scaling makes columns
    larger, which hurts codes that hold them: only channels that all of the linears take out are scaled."""
    scales: Tensor | None = None
    for one in taken:
        if one is None or one.scales is None:
            return None
        own = torch.zeros_like(one.scales, dtype=torch.bool).index_fill(0, one.channels, value=True)
        scales = one.scales if scales is None else torch.where(own, scales, 1.0)
    return scales


def _gathering(
    recipes: list[ModuleRecipe], activations: Activations | None, rows: Tensor | None, *, judged: bool
) -> Gathering:
    clip = 1.0
    if activations is not None and activations.clip == "search" and rows is not None:
        clip = best_clip(rows, activations)
    return Gathering(
        activations=None if activations is None else activation_format(activations, clip),
        absolute=any(recipe.compensation.needs_magnitudes for recipe in recipes),
        thresholds=any(recipe.residual is not None for recipe in recipes),
        products=not judged or any(recipe.needs_products for recipe in recipes),
    )


def _needs_rows(recipe: ModuleRecipe) -> bool:
    searches = recipe.activations is not None and recipe.activations.clip == "search"
    return searches or recipe.smoothing is not None or recipe.compensation.needs_rows


def _captured(
    block: Block, groups: list[SharedInputGroup], load: Callable[[], Tensor]
) -> dict[SharedInputGroup, Tensor]:
    """Up to `ROWS` evenly spaced rows [tokens, in] float32 of the input of each group, from the first shard; a group that no
    token reached has none."""
    found: dict[SharedInputGroup, Tensor] = {}

    def take(group: SharedInputGroup, rows: Tensor) -> None:
        check_activations(f"the input of {group[0]}", rows)
        tokens = rows.reshape(-1, rows.shape[-1])
        if len(tokens):
            found[group] = tokens[:: max(1, len(tokens) // ROWS)][:ROWS].float()

    with input_hooks(block, groups, take):
        block.run(load())
    return found
