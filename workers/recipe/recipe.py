"""What is done to a model's weights: the recipe, and its meaning for one module.

A recipe is part of the manifest; it knows nothing of jobs, files or clusters. `Recipe.for_module` resolves overrides, so
a block task is handed exactly what applies to its modules and nothing that does not (its key must not change when another
block's override does).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Config, Method
from counterweight.workers.methods.sign import SignWeights
from counterweight.workers.methods.stored import StoredWeights
from counterweight.workers.recipe.compensation import Compensation, NoCompensation
from counterweight.workers.recipe.rank import BudgetRank
from counterweight.workers.recipe.residual import Residual
from counterweight.workers.recipe.transforms import Rotation, Smoothing, Transform
from counterweight.workers.recipe.tuning import Tuning
from counterweight.workers.recipe.weights import GPTQ, RTN, Quantizer, WeightFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.quantization.result import QuantizationResult


class Weights(WeightFormat, StoredWeights):
    """Integer grid of the weights and the algorithm that chooses the codes."""

    quantizer: Quantizer = Field(default_factory=GPTQ)
    """How the codes are chosen."""

    def grid(self) -> WeightFormat:
        """The grid alone."""
        return WeightFormat(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def problem(self, rows: int, columns: int) -> str | None:
        if self.group_size is not None and columns % self.group_size:
            return f"group_size: {self.group_size}: expected a divisor of {columns}, the width"
        return None

    def stored_bits(self, rows: int, columns: int) -> int:
        groups = columns // self.group_size if self.group_size else 1
        zero_points = 0 if self.symmetric else rows * groups * self.bits
        return rows * columns * self.bits + rows * groups * 16 + zero_points

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def trainable(self) -> bool:
        return isinstance(self.quantizer, RTN)

    @property
    def regresses(self) -> str | None:
        quantizer = self.quantizer
        return (
            f"quantizer.target: {quantizer.target}"
            if isinstance(quantizer, GPTQ) and quantizer.target != "plain"
            else None
        )

    def target(self, weight: Tensor, statistics: InputStatistics, branch: Tensor | None = None) -> Tensor:
        from counterweight.workers.quantization.target import aimed

        return aimed(self.quantizer, weight, statistics, branch)

    def quantize(
        self, target: Tensor, statistics: InputStatistics | None, *, scale_dtype: torch.dtype
    ) -> QuantizationResult:
        from counterweight.workers.quantization import quantize

        return quantize(self.quantizer, target, statistics, self.grid(), scale_dtype=scale_dtype)

    def target_bytes(self, rows: int, columns: int) -> int:
        if self.regresses is None:
            return 0
        entries = matrix_bytes.DOUBLE * rows * columns
        # The products; the regression beside them; what is left of the weight, scaled twice, and the sum.
        return entries + max(matrix_bytes.right_divide(rows, columns), 4 * entries)

    def quantize_bytes(self, rows: int, columns: int) -> int:
        return self.quantizer.quantize_bytes(rows, columns)

    def nearest(self, weight: Tensor) -> Tensor:
        from counterweight.workers.quantization.grid import nearest

        return nearest(weight, self.grid())


AnyWeights = Weights | SignWeights
"""How weights are stored: on a uniform grid, or in the `format` that is named."""


class Activations(Method):
    """Dynamic, symmetric quantization of the inputs of quantized layers; absent: weight-only."""

    VERSION: ClassVar[int] = 1

    bits: Literal[4, 6, 8] = 8
    """Bits of an activation code."""
    clip: Annotated[float, Field(strict=True, gt=0, le=1)] | Literal["search"] = 1.0
    """Share of a token's largest magnitude that the codes reach; `search` finds, for each distinct input, the share with the
    smallest squared error on the first shard of the calibration tokens. Stock loaders know only 1."""
    group_size: Annotated[int, Field(strict=True, gt=0, multiple_of=32)] | None = None
    """Channels of a token that share a scale, a multiple of 32; null: one scale per token. Stock loaders know only null."""


class Override(Config):
    """Replaces parts of the recipe for the modules whose full name matches a glob; later overrides win."""

    match: Annotated[str, Field(min_length=1, max_length=200)]
    """Glob over module names such as `model.layers.0.mlp.down_proj`; `*` crosses dots."""
    weights: AnyWeights | None = None
    """Replaces the recipe's weights as a whole; null: they hold."""
    compensation: Compensation | None = None
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
    compensation: Compensation
    residual: Residual | None = None
    smoothing: Smoothing | None = None
    tuning: Tuning | None = None

    @property
    def regresses(self) -> bool:
        """Whether the solve looks at what the layer's input was meant to be, where it is another."""
        return self.weights.regresses is not None or self.compensation.joint or self.tuning is not None

    @property
    def budget_bits(self) -> float | None:
        """The budget that the rank of the branch is drawn from; None when it has a rank of its own or there is no branch."""
        rank = self.compensation.branch_rank
        return rank.budget_bits if isinstance(rank, BudgetRank) else None

    def gathers(self) -> dict[str, object]:
        """What calibration looks at: linears whose recipes differ in nothing else can be solved from the same statistics."""
        return {**self.model_dump(mode="json", exclude={"compensation"}), "compensation": self.compensation.gathers()}


class Recipe(Config):
    """How every linear layer of every block is compressed."""

    transforms: tuple[Transform, ...] = ()
    """What is done to the model before, without changing what it computes."""
    weights: AnyWeights
    """Grid and quantizer of the weights."""
    activations: Activations | None = None
    """Quantization of the inputs; null: weight-only."""
    compensation: Compensation = Field(default_factory=NoCompensation)
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
    def _once_each(cls, transforms: tuple[Transform, ...]) -> tuple[Transform, ...]:
        kinds = [transform.kind for transform in transforms]
        if len(kinds) != len(set(kinds)):
            raise ValueError(f"{', '.join(kinds)}: expected each kind at most once")
        return transforms

    @model_validator(mode="after")
    def _tunes_codes_of_its_own(self) -> Recipe:
        if self.tuning is None:
            return self
        recipes = [(self.weights, self.compensation)]
        recipes += [(item.weights or self.weights, item.compensation or self.compensation) for item in self.overrides]
        for weights, compensation in recipes:
            if not weights.trainable:
                kind = weights.quantizer.kind if isinstance(weights, Weights) else weights.format
                raise ValueError(f"tuning: expected weights.quantizer.kind rtn, not {kind}: training rounds")
            if not compensation.of_finished_codes:
                raise ValueError(f"tuning: expected a compensation of finished codes, not {compensation.kind}")
        return self

    @property
    def smoothing(self) -> Smoothing | None:
        """The smoothing among the transforms, if there is one."""
        return next((transform for transform in self.transforms if isinstance(transform, Smoothing)), None)

    @property
    def rotation(self) -> Rotation | None:
        """The rotation among the transforms, if there is one."""
        return next((transform for transform in self.transforms if isinstance(transform, Rotation)), None)

    @field_validator("keep")
    @classmethod
    def _keeps_head(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        if not any(fnmatchcase("lm_head", pattern) for pattern in keep):
            raise ValueError("expected a pattern for lm_head: quantizing it is not supported")
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
