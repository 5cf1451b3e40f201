"""The exact meaning of what inference kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_activations(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Per-token, dynamic, symmetric codes of x [..., in] and their scale [..., 1].

    scale = max|x| / ((2**bits - 1) / 2), codes = round-half-to-even(x / scale) clamped to the signed range, as
    compressed-tensors computes them; a token of zeros gets the dtype's epsilon as scale. Codes keep x's dtype (they are
    small integers and exact in any float), the scale too.
    """
    top = 2 ** (bits - 1)
    scale = x.abs().amax(dim=-1, keepdim=True) / ((2**bits - 1) / 2)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (x / scale).round().clamp(-top, top - 1), scale


def fake_quantize_activations(x: Tensor, bits: int) -> Tensor:
    """x [..., in] as an integer kernel sees it: `quantize_activations`, multiplied out again."""
    codes, scale = quantize_activations(x, bits)
    return codes * scale
