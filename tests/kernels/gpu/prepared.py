"""Weights and inputs for the kernels' tests; inputs prepared in plain torch, for no kernel to depend on another's."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.gpu.layout import PreparedInput
from counterweight.kernels.reference import quantize_activations
from counterweight.kernels.weights.uniform import UniformWeight
from tests.kernels.gpu.guarded import guarded


def random_weight(
    seed: int,
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    unit_scale: bool = False,
) -> UniformWeight:
    """Codes and zero points of the whole range, scales that differ by group."""
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else -(-in_features // group_size)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (out_features, in_features), generator=random, dtype=torch.int8)
    scale = torch.rand(out_features, groups, generator=random) * 0.02 + 0.01
    zero_point = torch.randint(-half, half, (out_features, groups), generator=random, dtype=torch.int8)
    return UniformWeight(
        codes=codes,
        scale=torch.ones_like(scale).to(dtype) if unit_scale else scale.to(dtype),
        zero_point=None if symmetric else zero_point,
        bits=bits,
        group_size=group_size,
    )


def random_input(seed: int, tokens: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """x [tokens, in], of another mean than zero: a wrong zero point shows."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, in_features, generator=random) + 0.5).to(dtype)


def random_low_rank(seed: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> LowRank:
    """Factors whose product is about as large as a weight; int8 codes with their steps for dtype int8."""
    random = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=random) * 0.1 for shape in ((out_features, rank), (rank, in_features)))
    if dtype is not torch.int8:
        return LowRank(up=up.to(dtype), down=down.to(dtype))
    codes_up, codes_down = ((factor * 300).round().clamp(-127, 127).to(torch.int8) for factor in (up, down))
    steps = torch.rand(2, rank, generator=random) / 300 + 1e-3
    return LowRank(up=codes_up, down=codes_down, up_scale=steps[0], down_scale=steps[1])


def projected(x: Tensor, low_rank: LowRank) -> Tensor:
    """What the up factor is multiplied by: down @ x in float32, times the steps of both factors."""
    y = x.double() @ low_rank.down.double().T
    if low_rank.up_scale is not None and low_rank.down_scale is not None:
        y = y * low_rank.up_scale * low_rank.down_scale
    return y.float()


def prepare(x: Tensor, *, bits: int | None = None, projection: Tensor | None = None) -> PreparedInput:
    """x as the weight kernels read it, between guard bands; bits: of its codes, None for x itself."""
    values, step = x, None
    if bits is not None:
        values, step = quantize_activations(x, bits)
        step = guarded(step[:, 0].float())
    return PreparedInput(
        values=guarded(values),
        step=step,
        sums=None,
        projected=None if projection is None else guarded(projection),
    )


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest expected value."""
    return float((y.double() - expected).abs().max() / expected.abs().max())
