"""What is done to a model's weights: the recipe, and its meaning for one module.

A recipe is part of the manifest; it knows nothing of jobs, files or clusters. `Recipe.for_module` resolves overrides, so
a block task is handed exactly what applies to its modules and nothing that does not (its key must not change when another
block's override does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from counterweight.workers.config import Config
from counterweight.workers.methods.activations import Activations
from counterweight.workers.methods.compensations import AnyCompensation, NoCompensation
from counterweight.workers.methods.residual import Residual
from counterweight.workers.methods.transforms import AnyTransform, Rotation, Smoothing
from counterweight.workers.methods.tuning import Tuning
from counterweight.workers.methods.weights import AnyWeights


class Override(Config):
    """Replaces parts of the recipe for the modules whose full name matches a glob; later overrides win."""

    match: Annotated[str, Field(min_length=1, max_length=200)]
    """Glob over module names such as `model.layers.0.mlp.down_proj`; `*` crosses dots."""
    weights: AnyWeights | None = None
    """Replaces the recipe's weights as a whole; null: they hold."""
    compensation: AnyCompensation | None = None
    """Replaces the recipe's compensation as a whole; null: it holds."""

    @model_validator(mode="after")
    def _does_something(self) -> Override:
        if self.weights is None and self.compensation is None:
            raise ValueError("an override must set weights or compensation, or it does nothing")
        return self


class ModuleRecipe(Config):
    """The recipe as it applies to one linear layer."""

    weights: AnyWeights
    activations: Activations | None
    compensation: AnyCompensation
    residual: Residual | None = None
    smoothing: Smoothing | None = None
    tuning: Tuning | None = None

    @property
    def regresses(self) -> bool:
        """Whether the solve looks at what the layer's input was meant to be, where it is another."""
        return self.weights.regresses is not None or self.compensation.joint or self.tuning is not None

    @property
    def scales_input(self) -> bool:
        """Whether it asks for the layer's input to be scaled where something before can take the scales in."""
        return self.smoothing is not None or self.compensation.scales_inputs

    @property
    def needs_products(self) -> bool:
        """Whether the solve looks at second moments of the layer's input; sharing out a budget of ranks does, whatever the
        branch is fitted to."""
        stored = self.residual is not None and self.residual.needs_products
        steps = self.weights.looks_at_input or self.compensation.needs_products or self.compensation.joint
        return steps or stored or self.budget_bits is not None

    @property
    def budget_bits(self) -> float | None:
        """The budget that the rank of the branch is drawn from; None when it has a rank of its own or there is no branch."""
        rank = self.compensation.branch_rank
        return None if rank is None else rank.budget

    def stacks(self, other: ModuleRecipe, *, same_size: bool) -> bool:
        """Whether linears with this and the `other` recipe that share an input are solved as one matrix. Those of different
        size are not where a branch enters the solve, because its rank depends on the number of rows."""
        by_size = self.compensation.anticipates or self.compensation.joint
        return self == other and self.weights.rows_are_independent and (same_size or not by_size)

    def gathers(self, *, products: bool = False) -> dict[str, object]:
        """What calibration looks at: linears whose recipes differ in nothing else can be solved from the same statistics.
        products: whether second moments are gathered although no step looks at them."""
        others = self.model_dump(mode="json", exclude={"compensation"})
        return {**others, "compensation": self.compensation.gathers(), "products": products or self.needs_products}


class Recipe(Config):
    """How every linear layer of every block is compressed."""

    transforms: tuple[AnyTransform, ...] = ()
    """What is done to the model before, without changing what it computes."""
    weights: AnyWeights
    """Grid and quantizer of the weights."""
    activations: Activations | None = None
    """Quantization of the inputs; null: weight-only."""
    compensation: AnyCompensation = Field(default_factory=NoCompensation)
    """What the low-rank branch puts back."""
    tuning: Tuning | None = None
    """Codes that are trained block by block, instead of chosen by the quantizer; null: they are not."""
    residual: Residual | None = None
    """What codes and branch left, stored for the CPU's memory and fetched while decoding; null: no such store."""
    overrides: tuple[Override, ...] = ()
    """Exceptions for some modules."""
    keep: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ("lm_head",)
    """Globs of module names that stay in the source's 16 or 32 bits. Embeddings, norms and routers always do."""

    @field_validator("transforms")
    @classmethod
    def _once_each(cls, transforms: tuple[AnyTransform, ...]) -> tuple[AnyTransform, ...]:
        kinds = [transform.kind for transform in transforms]
        if len(kinds) != len(set(kinds)):
            raise ValueError(f"{', '.join(kinds)}: expected each kind at most once")
        return transforms

    @model_validator(mode="after")
    def _tunes_codes_of_its_own(self) -> Recipe:
        if self.tuning is None:
            return self
        for weights, compensation in self._pairs():
            if weights.trained_grid is None:
                raise ValueError(f"tuning: expected weights.quantizer.kind rtn, not {weights.label}: training rounds")
            if (unused := weights.unused_in_training) is not None:
                raise ValueError(f"tuning: weights.{unused}: training starts on the whole range")
            if not compensation.of_finished_codes:
                raise ValueError(f"tuning: expected a compensation of finished codes, not {compensation.kind}")
        return self

    @model_validator(mode="after")
    def _anticipates_what_codes_look_at(self) -> Recipe:
        for weights, compensation in self._pairs():
            if compensation.anticipates and not weights.looks_at_input:
                raise ValueError(
                    f"compensation.anticipation: expected 0 with {weights.label}, which does not look at the input"
                )
        return self

    def _pairs(self) -> list[tuple[AnyWeights, AnyCompensation]]:
        """Weights and compensations that meet: the recipe's, and with each override those that then hold."""
        own = (self.weights, self.compensation)
        return [own, *((item.weights or own[0], item.compensation or own[1]) for item in self.overrides)]

    @property
    def smoothing(self) -> Smoothing | None:
        """The smoothing among the transforms, if there is one."""
        return next((found for transform in self.transforms if (found := transform.of_an_input)), None)

    @property
    def rotation(self) -> Rotation | None:
        """The rotation among the transforms, if there is one."""
        return next((found for transform in self.transforms if (found := transform.of_the_model)), None)

    @field_validator("keep")
    @classmethod
    def _keeps_head(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        if not any(fnmatchcase("lm_head", pattern) for pattern in keep):
            raise ValueError(
                "expected a pattern for lm_head, which none of these matches: quantizing it is not supported"
            )
        return keep

    def keeps(self, module: str) -> bool:
        """Whether the linear `module` (full name) is left alone."""
        return any(fnmatchcase(module, pattern) for pattern in self.keep)

    def for_module(self, module: str) -> ModuleRecipe | None:
        """What applies to the linear `module` (full name), or None when it is kept."""
        if self.keeps(module):
            return None
        weights, compensation = self.weights, self.compensation
        for override in self.overrides:
            if fnmatchcase(module, override.match):
                weights = override.weights or weights
                compensation = override.compensation or compensation
        return ModuleRecipe(
            weights=weights,
            activations=self.activations,
            compensation=compensation,
            residual=self.residual,
            smoothing=self.smoothing,
            tuning=self.tuning,
        )


def solved_together(recipes: Mapping[str, ModuleRecipe], rows: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Linears that share an input, by the solves that they take part in, in order. rows: linear -> its outputs."""
    waiting = list(recipes)
    while waiting:
        first, *others = waiting
        recipe = recipes[first]
        alike = [n for n in others if recipe.stacks(recipes[n], same_size=rows[n] == rows[first])]
        waiting = [name for name in others if name not in alike]
        yield (first, *alike)
