"""What a manifest can ask of the weights: their grid, the search for its scales, the quantizer that chooses the codes.

Options only, without torch: `workers/quantization` computes with them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Config, Method


class WeightFormat(Config):
    """The grid of a quantized weight."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a code."""
    group_size: Annotated[int, Field(strict=True, gt=0, multiple_of=32)] | None = None
    """Input columns that share a scale, a multiple of 32; null: one scale per output channel."""
    symmetric: bool = True
    """Whether the grid is centred on zero; otherwise each group has a zero point of its own."""

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale in a weight of this width.

        ValueError when groups do not tile it: stock loaders (compressed-tensors 0.20) refuse a ragged last group.
        """
        if self.group_size is None:
            return columns
        if columns % self.group_size:
            raise ValueError(f"weight: {columns} input columns: expected a multiple of group_size {self.group_size}")
        return self.group_size


class AbsoluteMaximum(Method):
    """The smallest scale that moves no value by more than half a step: the whole range of the group is covered."""

    VERSION: ClassVar[int] = 1

    kind: Literal["absmax"] = "absmax"

    @property
    def weighted(self) -> bool:
        """False: nothing is searched, so the importance of a column has no say."""
        return False


class MeanSquare(Method):
    """The scale with the smallest error of rounding and clipping, among candidates that give up part of the range.

    Candidates are evenly spaced multiples, 1 - shrink .. 1, of the range that `absmax` covers; the error of a group is
    sum_j importance_j * |q(w_j) - w_j|**norm.
    """

    VERSION: ClassVar[int] = 1

    kind: Literal["mse"] = "mse"
    norm: Annotated[float, Field(gt=0, le=8)] = 2.0
    """Exponent of the rounding error. 2 is the exponent of the output error; others cost a power per element."""
    candidates: Annotated[int, Field(strict=True, ge=2, le=1000)] = 20
    """How many ranges are tried, for each sign."""
    shrink: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of the range that the boldest candidate gives up."""
    weighted: bool = True
    """Whether a column counts by what its rounding errors cost. RTN: E[x^2] of its input. GPTQ: the part of E[x^2] that
    the columns rounded after it cannot make up for."""
    signed: bool = True
    """Whether a symmetric scale may be negative. Codes reach one step further down than up; the sign decides which end of
    the group gets that step. Costs nothing at inference; no effect on an asymmetric grid."""


ScaleSearch = Annotated[AbsoluteMaximum | MeanSquare, Field(discriminator="kind")]
"""How the scales of a grid are chosen."""


class RTN(Method):
    """Round to nearest. Needs no calibration unless its scale search is weighted."""

    VERSION: ClassVar[int] = 1

    kind: Literal["rtn"] = "rtn"
    scale: ScaleSearch = Field(default_factory=AbsoluteMaximum)
    """How scales are chosen."""

    @property
    def regressed_share(self) -> float:
        """None: codes reproduce the weight."""
        return 0.0

    def quantize_bytes(self, rows: int, columns: int) -> int:
        """Memory at the peak, beside the weight [rows, columns] float32."""
        gram = matrix_bytes.DOUBLE * columns * columns if self.scale.weighted else 0
        return gram + (matrix_bytes.SINGLE + 1) * rows * columns  # codes in float32, then in int8


class GPTQ(Method):
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
    scale: ScaleSearch = Field(default_factory=MeanSquare)
    """How scales are chosen."""
    target: Literal["plain", "regressed", "mixed"] = "plain"
    """What the codes are to reproduce. plain: the weight. regressed: the matrix whose product with the layer's real input
    (quantized, or made by compressed blocks) comes nearest to the weight's with the original input: LRC's Update-Quant, and
    the asymmetric calibration of GPTAQ and QEP. The least error of a layer, but it shrinks what noise blurs, and that adds
    up over layers. mixed: between them. No difference where both inputs are the same."""
    mix: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the regressed target in a mixed one; null: one half."""

    @model_validator(mode="after")
    def _mixes_when_mixed(self) -> GPTQ:
        if self.mix is not None and self.target != "mixed":
            raise ValueError("mix: expected only with target: mixed")
        return self

    @property
    def regressed_share(self) -> float:
        """How much of the target is the regressed one."""
        return {"plain": 0.0, "mixed": 0.5 if self.mix is None else self.mix, "regressed": 1.0}[self.target]

    def quantize_bytes(self, rows: int, columns: int) -> int:
        """Memory at the peak, beside the weight [rows, columns] float32 and the statistics."""
        square, entries = columns * columns, rows * columns
        # The Hessian in rounding order, the same reversed, its factor.
        factorizing = 2 * matrix_bytes.DOUBLE * square + matrix_bytes.cholesky(columns)
        # Hessian and root in float64, and one of them in float32. The columns, and with the codes either aims and errors
        # (feedback) or new codes and errors (descent).
        metric = (2 * matrix_bytes.DOUBLE + matrix_bytes.SINGLE) * square
        return max(factorizing, metric + 4 * matrix_bytes.SINGLE * entries)


Quantizer = Annotated[RTN | GPTQ, Field(discriminator="kind")]
"""How codes are chosen."""
