"""What kernels of layers' inputs must compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.hadamard import Hadamard


def lower_gram(x: Tensor, scale: float = 1.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """scale * sum over tokens of x x^T for x [tokens, in]: [in, in] of `dtype`, zero above the diagonal."""
    return (x.to(dtype).T @ x.to(dtype) * scale).tril()


def layer_input(
    x: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    smooth: Tensor | None = None,
    hadamard: Hadamard | None = None,
) -> Tensor:
    """What a layer quantizes and projects, [..., in] in x's dtype: x after an RMSNorm with its weight [in] and epsilon, as
    transformers computes it, times smooth [in], transformed."""
    if norm is not None:
        weight, epsilon = norm
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    if smooth is not None:
        x = x * smooth
    return x if hadamard is None else hadamard.apply(x)
