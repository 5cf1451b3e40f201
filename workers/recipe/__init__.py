"""Recipes: everything that a manifest can ask of a layer, as values. No torch here, so that a wrong manifest is refused
before anything heavy is imported."""

from __future__ import annotations

from counterweight.workers.methods.sign import SignWeights
from counterweight.workers.recipe.compensation import ASER, LRC, SVD, Compensation, NoCompensation
from counterweight.workers.recipe.rank import BudgetRank, CountRank, EnergyRank, FractionRank, Rank
from counterweight.workers.recipe.recipe import Activations, AnyWeights, ModuleRecipe, Override, Recipe, Weights
from counterweight.workers.recipe.residual import Residual
from counterweight.workers.recipe.transforms import Rotation, Smoothing, Transform
from counterweight.workers.recipe.tuning import Tuning
from counterweight.workers.recipe.weights import (
    GPTQ,
    RTN,
    AbsoluteMaximum,
    MeanSquare,
    Quantizer,
    ScaleSearch,
    WeightFormat,
)

__all__ = [
    "ASER",
    "LRC",
    "GPTQ",
    "RTN",
    "SVD",
    "AbsoluteMaximum",
    "Activations",
    "AnyWeights",
    "BudgetRank",
    "Compensation",
    "CountRank",
    "EnergyRank",
    "FractionRank",
    "MeanSquare",
    "ModuleRecipe",
    "NoCompensation",
    "Override",
    "Quantizer",
    "Rank",
    "Residual",
    "Rotation",
    "Transform",
    "Recipe",
    "ScaleSearch",
    "SignWeights",
    "Smoothing",
    "Tuning",
    "WeightFormat",
    "Weights",
]
