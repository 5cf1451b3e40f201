"""GPTQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_flops import Work, cholesky, elementwise, product, steps
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers.quantizer import Quantizer
from counterweight.workers.methods.scales import AnyScaleSearch, MeanSquare

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.quantization.result import QuantizationResult


class GPTQ(Quantizer):
    """Rounding with error feedback through the second moments of the layer's input, then coordinate descent."""

    VERSION: ClassVar[int] = 1

    kind: Literal["gptq"] = "gptq"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of a typical channel's E[x^2] (the median over those that had input) that is added to every channel's: what
    calibration did not see. The usual mean is not typical: outlier channels make it larger than most channels' own."""
    act_order: bool = True
    """Whether columns are rounded in the order of decreasing E[x^2], so that the strongest still have all others to pass
    their error to. Groups keep their place and their scales: stored tensors are not permuted."""
    block_size: Annotated[int, Field(strict=True, ge=1, le=4096)] = 64
    """Columns between two updates of all columns to come; a matter of speed, the result is the same up to rounding."""
    refinement: Annotated[int, Field(strict=True, ge=0, le=100)] = 2
    """Passes of coordinate descent over the columns after GPTQ."""
    scale: AnyScaleSearch = Field(default_factory=MeanSquare)
    """How scales are chosen."""
    target: Literal["plain", "regressed", "mixed"] = "plain"
    """What the codes are to reproduce. plain: the weight. regressed: the matrix whose product with the layer's real input
    (quantized, or made by compressed blocks) comes nearest to the weight's with the original input: LRC's Update-Quant, and
    the asymmetric calibration of GPTAQ and QEP. Of all dense matrices it has the layer's least error, but what noise
    blurs it shrinks: its output has at most the mean square of the weight's. mixed: between them. No difference where both
    inputs are the same."""
    mix: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the regressed target in a mixed one; null: one half."""

    @model_validator(mode="after")
    def _mixes_when_mixed(self) -> GPTQ:
        if self.mix is not None and self.target != "mixed":
            raise ValueError("mix: expected only with target: mixed")
        return self

    @property
    def looks_at_input(self) -> bool:
        return True

    @property
    def regressed_share(self) -> float:
        """How much of the target is the regressed one."""
        return {"plain": 0.0, "mixed": 0.5 if self.mix is None else self.mix, "regressed": 1.0}[self.target]

    @property
    def regresses(self) -> str | None:
        return None if self.target == "plain" else f"quantizer.target: {self.target}"

    def aim(self, weight: Tensor, statistics: InputStatistics, branch: Tensor | None = None) -> Tensor:
        """See `workers.quantization.target`; the regression has the quantizer's damping."""
        from counterweight.workers.quantization.target import regressed

        share = self.regressed_share
        if share == 0 or statistics.tokens == 0:
            return super().aim(weight, statistics, branch)
        return regressed(weight, statistics, branch, share=share, damping=self.damping)

    def quantize_batch(
        self,
        weights: Tensor,
        statistics: Sequence[InputStatistics | None],
        format: WeightFormat,
        *,
        scale_dtype: torch.dtype,
    ) -> list[QuantizationResult]:
        """See `workers.quantization.gptq`."""
        from counterweight.workers.quantization.gptq import gptq

        return gptq(self, weights, statistics, format, scale_dtype)

    def quantize_bytes(self, rows: int, columns: int, batch: int = 1) -> int:
        square, entries = columns * columns, rows * columns
        # Each weight's metric, root and Hessian divided by their diagonals, in float32.
        metric = 2 * matrix_bytes.SINGLE * square
        # One Hessian in rounding order, which becomes its factor, beside the root that is made of it.
        factorizing = (matrix_bytes.DOUBLE + matrix_bytes.SINGLE) * square + (batch - 1) * metric
        # The columns, and with the codes either aims and errors (feedback) or new codes and errors (descent).
        return max(factorizing, batch * (metric + 4 * matrix_bytes.SINGLE * entries))

    def quantize_flops(self, rows: int, columns: int, *, symmetric: bool) -> Work:
        """Every pass that is asked for; descent ends before at a fixed point."""
        square, entries, block = columns**2, rows * columns, min(self.block_size, columns)
        # The check and the mean of the Gram matrix; root and Hessian divided by their diagonals.
        metric = cholesky(columns) + elementwise(4 * square)
        scales = self.scale.fit_flops(entries, symmetric=symmetric)
        # Within a block each column changes those behind it, entry by entry.
        within = elementwise(entries * block)
        # Each column takes the errors of the blocks before it: half of a product. Divided, rounded, clamped, and what is left.
        feedback = within + product(rows, columns, columns - block) * 0.5 + elementwise(5 * entries)
        # Slopes: a whole product.
        descent = within + product(rows, columns, columns) + elementwise(8 * entries)
        # Of a column: divided, rounded, clamped, what is left, fed back; in descent two subtractions more.
        launched = steps(columns * (5 + 7 * self.refinement))
        return metric + scales + feedback + elementwise(3 * entries) + descent * self.refinement + launched
