"""Quantization that gradients pass through: round to nearest on a grid whose range is learned.

Learnable weight clipping, LWC (Shao et al., "OmniQuant", 2023, section 3.2): the range [low, high] of a group shrinks to
[sigmoid(a) low, sigmoid(b) high] with learned a and b, from which scale and zero point follow as for round to nearest.
Rounding has no useful gradient, so it is given that of the identity (straight-through, Bengio et al. 2013). Clamping keeps
its own: a clipped weight moves the bound of the range, not the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.methods.grid import WeightFormat

UNCLIPPED = 4.0
"""Where clipping starts, as in OmniQuant: sigmoid(4) = 0.982 of the range, and still a gradient to move by."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, to the bit, with the gradient of `exact`; both of one shape and dtype."""
    result: Tensor = _StraightThrough.apply(exact, rounded.detach())  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeQuantized:
    """A weight on its grid, in float32 and differentiable.

    codes: [out, groups, columns], whole numbers in the format's range. scale: [out, groups, 1], values of `scale_dtype`.
    zero_point: [out, groups, 1], whole numbers in the codes' range; None when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: WeightFormat
    scale_dtype: torch.dtype

    def weight(self) -> Tensor:
        """[out, in] float32: to the bit what `stored().dequantize()` gives."""
        centred = self.codes if self.zero_point is None else self.codes - self.zero_point
        return (centred * self.scale).flatten(1)

    def stored(self) -> UniformWeight:
        """The same weight as the checkpoint will hold it. ValueError when a scale does not fit its dtype."""
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError(f"weight: a scale exceeds the range of {self.scale_dtype}, in which it would be stored")
        zero = self.zero_point
        return UniformWeight(
            codes=self.codes.detach().flatten(1).to(torch.int8),
            scale=self.scale.detach().squeeze(-1).to(self.scale_dtype),
            zero_point=None if zero is None else zero.detach().squeeze(-1).to(torch.int8),
            bits=self.format.bits,
            group_size=self.format.group_size,
        )


def clipping_of(weight: Tensor, format: WeightFormat) -> Tensor:
    """Clipping to start with, for a weight [out, in]: [bounds, out, groups, 1] float32, before the sigmoid.

    A symmetric grid has one bound, an asymmetric one a lower and an upper. ValueError when groups do not tile the weight.
    """
    rows, columns = weight.shape
    groups = columns // format.columns_per_group(columns)
    return torch.full((1 if format.symmetric else 2, rows, groups, 1), UNCLIPPED, device=weight.device)


def fake_quantize(
    weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, clipping: Tensor | None = None
) -> FakeQuantized:
    """`weight` [out, in] float32 rounded to nearest; gradients reach `weight` and `clipping`.

    clipping: as `clipping_of` makes it, or None to cover the whole range, which is the grid of `absmax` to the bit.
    ValueError when groups do not tile the weight.
    """
    groups = weight.unflatten(1, (-1, format.columns_per_group(weight.shape[1])))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if format.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
    if clipping is not None:
        shares = clipping.sigmoid()
        low, high = low * shares[0], high * shares[-1]
    span = high - low
    scale = span / (format.highest - format.lowest)
    # As in `grid`: the smallest normal scale for too small a range; for a range of nothing but zeros, one.
    rounded = scale.to(scale_dtype).clamp_min(torch.finfo(scale_dtype).tiny).masked_fill(span == 0, 1)
    scale = straight_through(scale, rounded.float())
    codes = _rounded(groups / scale)
    if format.symmetric:
        zero = None
    else:
        zero = _rounded(format.lowest - low / scale).clamp(format.lowest, format.highest)
        codes = codes + zero
    codes = codes.clamp(format.lowest, format.highest)
    return FakeQuantized(codes=codes, scale=scale, zero_point=zero, format=format, scale_dtype=scale_dtype)


def _rounded(exact: Tensor) -> Tensor:
    return straight_through(exact, exact.detach().round())
