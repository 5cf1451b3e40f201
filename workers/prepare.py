"""What is decided about a block from its first calibration tokens, before its statistics are gathered.

Scales that smooth inputs, channels that ASER takes out, clips of quantized activations: choices that need rows of the input
and not its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.calibration.clipping import activation_format, best_clip
from counterweight.workers.calibration.statistics import Gathering
from counterweight.workers.hooks import input_hooks
from counterweight.workers.methods.activations import Activations
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.family import ModelFamily, SharedInputGroup
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.transforms.smoothing import after, before, producer_rows, scaled

ROWS = 2048
"""Tokens that choices are made on; 512 of them where every candidate is tried in a product with the weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """gatherings: what to gather of each group's input. scales: by what its input is to be divided before that, [in].
    outliers: channels that ASER takes out."""

    gatherings: Mapping[SharedInputGroup, Gathering]
    scales: Mapping[SharedInputGroup, Tensor] = field(default_factory=dict)
    outliers: Mapping[SharedInputGroup, Tensor] = field(default_factory=dict)


def prepare(
    block: Block,
    recipes: Mapping[str, ModuleRecipe],
    parameters: Mapping[str, Tensor],
    family: ModelFamily,
    online: Mapping[str, Hadamard],
    load: Callable[[], Tensor],
) -> Preparation:
    """Choices for every group of linears that share an input; a group takes the options of its first member that has a recipe.

    parameters: the block's, names relative to it. online: linears whose input is transformed at inference. load: the first
    shard of the block's input, read only where a choice needs it.
    """
    groups = {
        group: next(recipes[name] for name in group if name in recipes)
        for group in block.groups
        if any(name in recipes for name in group)
    }
    curious = [group for group, recipe in groups.items() if _needs_rows(recipe)]
    rows = _captured(block, curious, load) if curious else {}
    scales: dict[SharedInputGroup, Tensor] = {}
    outliers: dict[SharedInputGroup, Tensor] = {}
    gatherings: dict[SharedInputGroup, Gathering] = {}
    for group, recipe in groups.items():
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
        taken = None
        if seen is not None and recipe.compensation.needs_rows:
            taken = recipe.compensation.take_out(weights, seen.abs().double().mean(0))
        if seen is not None and taken is not None:
            outliers[group] = taken.channels
            # Behind a transform there are no outlier channels left to scale.
            if taken.scales is not None and foldable and transform is None:
                scales[group] = scales.get(group, torch.ones_like(taken.scales)) * taken.scales
                seen = seen / taken.scales.float()
        gatherings[group] = _gathering([recipes[name] for name in group if name in recipes], recipe.activations, seen)
    return Preparation(gatherings=gatherings, scales=scales, outliers=outliers)


def _gathering(recipes: list[ModuleRecipe], activations: Activations | None, rows: Tensor | None) -> Gathering:
    clip = 1.0
    if activations is not None and activations.clip == "search" and rows is not None:
        clip = best_clip(rows, activations)
    return Gathering(
        activations=None if activations is None else activation_format(activations, clip),
        absolute=any(recipe.compensation.needs_magnitudes for recipe in recipes),
        thresholds=any(recipe.residual is not None for recipe in recipes),
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
        tokens = rows.reshape(-1, rows.shape[-1])
        if len(tokens):
            found[group] = tokens[:: max(1, len(tokens) // ROWS)][:ROWS].float()

    with input_hooks(block, groups, take):
        block.run(load())
    return found
