"""The exact meaning of what inference kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import ActivationFormat


def quantize_activations(x: Tensor, bits: int, *, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Dynamic, symmetric codes of x [..., in], one scale [..., 1] per last dimension.

    scale = clip * max|x| / ((2**bits - 1) / 2), codes = round-half-to-even(x / scale) clamped to the signed range; with
    clip = 1 as compressed-tensors computes them. A token of zeros gets the dtype's epsilon as scale. Codes keep x's dtype
    (they are small integers and exact in any float), the scale too. clip: in (0, 1]; below 1 the largest values saturate
    so that the others get finer steps.
    """
    top = 2 ** (bits - 1)
    scale = x.abs().amax(dim=-1, keepdim=True) / ((2**bits - 1) / 2)
    if clip != 1.0:
        scale = scale * clip
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (x / scale).round().clamp(-top, top - 1), scale


def fake_quantize_activations(x: Tensor, format: ActivationFormat) -> Tensor:
    """x [..., in] as an integer kernel sees it: `quantize_activations` per token or per group, multiplied out again."""
    grouped = x if format.group_size is None else x.unflatten(-1, (-1, format.group_size))
    codes, scale = quantize_activations(grouped, format.bits, clip=format.clip)
    return (codes * scale).reshape(x.shape)
