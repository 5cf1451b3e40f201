"""Weights as signs and two vectors (OneBit, Xu et al. 2024): one bit a weight, sixteen an input and an output channel.

W ~ diag(g) sign(W) diag(h). Whatever g, h >= 0 are, no signs are nearer to W than its own; and with them, the error

    sum_ij m_j (W_ij - g_i sign(W_ij) h_j)^2  =  sum_ij m_j (|W_ij| - g_i h_j)^2

is that of the best matrix of rank one for |W|, which the first singular vectors of |W| diag(m)^(1/2) give (Eckart-Young). They
have no negative entries, because |W| has none (Perron-Frobenius), and power iteration from its column sums finds them: no whole
decomposition is needed for one direction. m_j is 1, or E[x_j^2] of the layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from counterweight.workers import matrix_bytes
from counterweight.workers.config import Method
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, product64
from counterweight.workers.methods.weights.stored import StoredWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from counterweight.kernels.weights.sign import SignWeight
    from counterweight.workers.calibration.statistics import InputStatistics
    from counterweight.workers.quantization.result import QuantizationResult


STEPS = 200
"""Of power iteration at most. Two directions of nearly one strength end here, and either is as good: the error is then above
the least by less than 1e-3 of the weight's energy."""

TYPICAL_STEPS = 4
"""Of power iteration, as a plan counts them: what 84 of 126 linears of the demo's and the reference models took; others took
up to 9."""

SETTLED = 1e-13
"""Relative change of the singular value at which it has been found."""


class SignWeights(StoredWeights, Method):
    """One bit per weight: its sign, with one scale per output and one per input channel (OneBit, Xu et al. 2024). Only our own
    loader reads it."""

    VERSION: ClassVar[int] = 3
    rows_are_independent: ClassVar[bool] = False

    format: Literal["sign"]
    """How the weights are stored; absent: integer codes on a uniform grid."""
    weighted: bool = True
    """Whether an input channel counts by its E[x^2] when the scales are chosen."""

    def problem(self, rows: int, columns: int) -> str | None:
        del rows, columns
        return None

    def stored_bits(self, rows: int, columns: int) -> int:
        return 32 * rows * -(-columns // 32) + 16 * (rows + columns)

    @property
    def code_bits(self) -> int:
        return 1

    @property
    def label(self) -> str:
        return self.format

    @property
    def looks_at_input(self) -> bool:
        return self.weighted

    def quantize_batch(
        self, targets: Tensor, statistics: Sequence[InputStatistics | None], *, scale_dtype: torch.dtype
    ) -> list[QuantizationResult]:
        """ValueError for a target that is not a finite matrix, for scales that do not fit `scale_dtype`, and for statistics
        that are absent or of another width when channels are weighted. Without a token channels count alike, which is
        recorded."""
        from counterweight.workers.quantization.inputs import checked_matrices

        matrices = checked_matrices("weight", targets)
        return [self._stored(matrix, seen, scale_dtype) for matrix, seen in zip(matrices, statistics, strict=True)]

    def _stored(
        self, matrix: Tensor, statistics: InputStatistics | None, scale_dtype: torch.dtype
    ) -> QuantizationResult:
        from counterweight.workers.quantization.inputs import checked_statistics
        from counterweight.workers.quantization.result import Fallback, QuantizationResult

        importance: Tensor | None = None
        fallbacks: tuple[Fallback, ...] = ()
        if self.weighted:
            power = checked_statistics(statistics, matrix.shape[1]).mean_gram().diagonal()
            importance = power if bool((power > 0).any()) else None
            if importance is None:
                cause = "no calibration token arrived: input channels count alike"
                fallbacks = (Fallback(step="sign.weighted", cause=cause),)
        return QuantizationResult(weight=nearest_signs(matrix, importance, scale_dtype), fallbacks=fallbacks)

    def quantize_bytes(self, rows: int, columns: int, batch: int = 1) -> int:
        del batch  # one after the other, and what is left of each is small
        # The mean Gram matrix whose diagonal is looked at; magnitudes in float64, before and behind their weights.
        gram = matrix_bytes.DOUBLE * columns * columns if self.weighted else 0
        return gram + 2 * matrix_bytes.DOUBLE * rows * columns

    def quantize_flops(self, rows: int, columns: int) -> Work:
        # The check and the mean of the Gram matrix; the weight's own check.
        gram = elementwise(2 * columns**2) if self.weighted else NOTHING
        return gram + _signs_flops(rows * columns) + elementwise(rows * columns)

    def nearest_flops(self, entries: int) -> Work:
        return _signs_flops(entries) + elementwise(2 * entries)  # read back

    def nearest(self, weight: Tensor) -> Tensor:
        import torch

        return nearest_signs(weight, None, torch.float32).dequantize()


def _signs_flops(entries: int) -> Work:
    """Arithmetic of `nearest_signs`: two products with a vector a step, one in the last; magnitudes, weighted and summed, and
    signs."""
    return product64(entries, 1, 1) * (2 * TYPICAL_STEPS - 1) + elementwise(4 * entries)


def nearest_signs(weight: Tensor, importance: Tensor | None, scale_dtype: torch.dtype) -> SignWeight:
    """The signs and scales with the least squared error for `weight` [out, in] float32, its columns weighted by `importance`
    [in]; the decomposition in float64. ValueError when a scale does not fit `scale_dtype`."""
    import torch

    from counterweight.kernels.weights.sign import SignWeight

    roots = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    if importance is not None:
        # A channel without input counts a little: its scale has to be something.
        roots = importance.double().sqrt()
        roots = roots.clamp_min(1e-3 * roots.max())
    left, value, right = _first_direction(weight.double().abs() * roots)
    row_scale, column_scale = left * value**0.5, right * value**0.5 / roots
    stored = [scale.to(scale_dtype) for scale in (row_scale, column_scale)]
    if not all(bool(torch.isfinite(scale).all()) for scale in stored):
        raise ValueError(f"weight: a scale exceeds the range of {scale_dtype}, in which it would be stored")
    return SignWeight.of(weight, *stored)


def _first_direction(matrix: Tensor) -> tuple[Tensor, float, Tensor]:
    """The first left singular vector [out], singular value and right vector [in] of a `matrix` without negative entries."""
    right = _unit(matrix.sum(0))
    value, before = 0.0, -1.0
    for _ in range(STEPS):
        left = matrix @ right
        value = float(left.norm())
        left = left / max(value, 1e-300)
        if abs(value - before) <= SETTLED * value:
            break
        right, before = _unit(left @ matrix), value
    return left, value, right


def _unit(vector: Tensor) -> Tensor:
    scaled: Tensor = vector / vector.norm().clamp_min(1e-300)
    return scaled
