"""Codes that are learned block by block. `workers/tuning` has the mathematics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Method
from counterweight.workers.matrix_flops import Work, elementwise, product, svd

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

    VERSION: ClassVar[int] = 3

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

    def held(self, sequences: int) -> int:
        """How many of the calibration sequences are held out; at least one, not all."""
        return min(max(1, round(self.held_out * sequences)), sequences - 1)

    def passes(self, sequences: int) -> tuple[int, int]:
        """How many sequences run through the block forward, and backward, when patience does not end training before: all of
        them before the first epoch and in each, with clipping those held out once more; backward without those held out."""
        held = self.held(sequences)
        return (self.epochs + 1) * sequences + held * self.clipping, self.epochs * (sequences - held)

    def train_flops(self, rows: int, columns: int, sequences: int) -> Work:
        """Arithmetic of training a linear [rows, columns] beside the passes through the block, likewise: its singular vectors,
        and for every step the weight that follows from the increments and the gradient of these."""
        held = self.held(sequences)
        backward = -(-(sequences - held) // self.batch)
        judging = -(-held // self.batch)
        forward = (self.epochs + 1) * (backward + judging) + judging * self.clipping + 1
        entries, smaller = rows * columns, min(rows, columns)
        # The range, codes and their values; and their gradients, down to the clipping or to every entry.
        down = 20 if self.increments or self.transforms else 12
        steps = elementwise(entries * (7 * forward + down * self.epochs * backward))
        if not self.increments:
            return steps
        weight = product(rows, smaller, columns)
        if side := min(self.block, smaller):
            weight += product(rows, side, side) + product(rows, side, columns)
        return svd(rows, columns) + steps + weight * (forward + self.epochs * backward)
