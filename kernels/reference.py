"""The exact meaning of what inference kernels compute, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.weights import StoredWeight


def quantize_activations(x: Tensor, bits: int, *, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Dynamic, symmetric codes of x [..., in], one scale [..., 1] per last dimension.

    scale = clip * max|x| / ((2**bits - 1) / 2), codes = round-half-to-even(x / scale) clamped to the signed range; with
    clip = 1 as compressed-tensors computes them. A token of zeros gets the dtype's epsilon as scale. Codes keep x's dtype
    (they are small integers and exact in any float), the scale too. clip: in (0, 1]; below 1 the largest values saturate
    so that the others get finer steps.
    """
    top = 2 ** (bits - 1)
    largest = x.abs().amax(dim=-1, keepdim=True)
    # By a tensor: where it divides by a number, torch on a GPU multiplies by the reciprocal, which rounds otherwise.
    scale = largest / torch.full_like(largest, (2**bits - 1) / 2)
    if clip != 1.0:
        scale = scale * clip
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (x / scale).round().clamp(-top, top - 1), scale


def fake_quantize_activations(x: Tensor, format: ActivationFormat, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., in] as an integer kernel sees it: `quantize_activations` per token or per group, multiplied out again in `dtype`,
    by default x's; quantized it is in x's own."""
    dtype = dtype or x.dtype
    grouped = x if format.group_size is None else x.unflatten(-1, (-1, format.group_size))
    codes, scale = quantize_activations(grouped, format.bits, clip=format.clip)
    return (codes.to(dtype) * scale.to(dtype)).reshape(x.shape)


def linear(
    x: Tensor,
    weight: StoredWeight,
    *,
    low_rank: LowRank | None = None,
    bias: Tensor | None = None,
    activations: ActivationFormat | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A compensated layer, Q(x) W^T + (x D^T) U^T + b, for x [..., in]: [..., out], products and sums in `dtype`.

    Q quantizes in x's own dtype, as `quantize_activations`; None: not at all. The low-rank branch sees the unquantized x.
    """
    inner = x.to(dtype) if activations is None else fake_quantize_activations(x, activations, dtype)
    y = inner @ weight.dequantize(dtype).T
    if low_rank is not None:
        up, down = low_rank.factors(dtype)
        y = y + x.to(dtype) @ down.T @ up.T
    return y if bias is None else y + bias.to(dtype)


def experts(
    x: Tensor,
    weights: Sequence[StoredWeight],
    expert_of: Tensor,
    *,
    low_ranks: Sequence[LowRank | None] | None = None,
    gates: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each token's experts applied to it: [tokens, top_k, out] in `dtype`, one row per token and chosen expert.

    x: [tokens, in], or [tokens, top_k, in] when each choice has an input of its own. expert_of: [tokens, top_k] integers.
    gates: [tokens, top_k], weights that the rows are multiplied by. The sum over top_k is left to the caller.
    """
    inputs = x if x.ndim == 3 else x.unsqueeze(1).expand(-1, expert_of.shape[1], -1)
    y = torch.zeros(*expert_of.shape, weights[0].shape[0], dtype=dtype, device=x.device)
    for expert, weight in enumerate(weights):
        chosen = expert_of == expert
        low_rank = None if low_ranks is None else low_ranks[expert]
        y[chosen] = linear(inputs[chosen], weight, low_rank=low_rank, dtype=dtype)
    return y if gates is None else y * gates.unsqueeze(2).to(dtype)
