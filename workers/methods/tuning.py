"""Codes that are learned block by block. `workers/tuning` has the mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Method

if TYPE_CHECKING:
    from torch import Tensor

    from counterweight.workers.models.block_builder import Block
    from counterweight.workers.tuning.lsi import LinearFormat, TuningResult

Rate = Annotated[float, Field(gt=0)]


class Tuning(Method):
    """Quantization with parameters that are trained to give back the block's output, in place of a quantizer.

    Rounding is to nearest; what is learned is where to round from (LSI, Gao et al. 2024) and onto which grid (LWC and LET
    of OmniQuant, Shao et al. 2023). Some sequences are held out, and the epoch that serves them best is the one kept, the
    untrained one (rounding to nearest) included: tuning is never worse on them than that.
    """

    VERSION: ClassVar[int] = 2

    kind: Literal["lsi"] = "lsi"
    increments: bool = True
    """LSI: whether each linear's singular values are learned."""
    clipping: bool = True
    """LWC: whether the range that each group's grid covers is learned."""
    transforms: bool = False
    """LET: whether scales of the input channels are learned, which then divide the norm in front of a linear and multiply
    its columns. Only where a norm feeds nothing but linears that are quantized: not a mixture of experts' MLP."""
    block: Annotated[int, Field(strict=True, ge=0, le=4096)] = 0
    """Side of the square that is learned beside the increments, among the largest singular directions: it may turn them
    into each other. 0: none."""
    epochs: Annotated[int, Field(strict=True, ge=1, le=1000)] = 20
    """Passes over the calibration sequences at most. Learning rates fall linearly over them."""
    batch: Annotated[int, Field(strict=True, ge=1, le=4096)] = 1
    """Sequences per step."""
    lr_increments: Rate = 2e-3
    """Learning rate of the increments and the square. In grid steps: increments of one move the typical weight by one."""
    lr_clipping: Rate = 1e-1
    """Learning rate of the clipping, before its sigmoid."""
    lr_transforms: Rate = 5e-3
    """Learning rate of the logarithms of the channel scales."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the calibration sequences that is not trained on, at least one."""
    patience: Annotated[int, Field(strict=True, ge=1, le=1000)] = 5
    """Epochs without a better held-out error after which training stops."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)] = 0
    """Decides which sequences are held out and the order of the others."""

    @model_validator(mode="after")
    def _learns_something(self) -> Tuning:
        if not (self.increments or self.clipping or self.transforms):
            raise ValueError("increments, clipping, transforms: all false: expected one to learn")
        if self.block and not self.increments:
            raise ValueError(f"block: {self.block}: expected 0 unless increments are learned")
        return self

    def tune(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        formats: Mapping[str, LinearFormat],
    ) -> TuningResult:
        """See `workers.tuning.lsi.tune`."""
        from counterweight.workers.tuning.lsi import tune

        return tune(block, inputs, targets, formats, self)

    def train_bytes(self, rows: int, columns: int) -> int:
        """Memory of training a linear [rows, columns] at its peak: its singular vectors, and what a step keeps for gradients
        of rounding (the weight, over its scale, rounded, whether it was clipped, in float32 each; with transforms before and
        behind them)."""
        smaller = min(rows, columns)
        vectors = smaller * (rows + columns) if self.increments else 0
        return matrix_bytes.SINGLE * (vectors + (7 if self.transforms else 5) * rows * columns)
