"""Compressed linears made of random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import linear
from counterweight.kernels.residual import Correction, ResidualStore
from counterweight.kernels.weights.sign import SignWeight
from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.block import CompressedLinear

OUT, IN, RANK = 48, 128, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    top = 2 ** (bits - 1)
    return (random(*shape, seed=seed) * top / 2).round().clamp(-top, top - 1).to(torch.int8)


def uniform(bits: int = 4, group_size: int | None = 32) -> UniformWeight:
    groups = 1 if group_size is None else IN // group_size
    return UniformWeight(
        codes=codes(OUT, IN, bits=bits),
        scale=random(OUT, groups, seed=1).abs() + 0.1,
        zero_point=codes(OUT, groups, bits=bits, seed=2),
        bits=bits,
        group_size=group_size,
    )


def sign() -> SignWeight:
    return SignWeight.of(random(OUT, IN), random(OUT, seed=1).abs(), random(IN, seed=2).abs())


def floats() -> LowRank:
    return LowRank(up=random(OUT, RANK, seed=3), down=random(RANK, IN, seed=4))


def integers(bits: int) -> LowRank:
    return LowRank(
        up=codes(OUT, RANK, bits=bits, seed=3),
        down=codes(RANK, IN, bits=bits, seed=4),
        up_scale=random(RANK, seed=5).abs(),
        down_scale=random(RANK, seed=6).abs(),
        code_bits=4 if bits == 4 else 8,
    )


def store() -> Correction:
    residual = ResidualStore.of(
        codes(OUT, IN, bits=4, seed=7).clamp(-7, 7), random(OUT, seed=8).abs(), torch.linspace(3, 0, IN)
    )
    return Correction(store=residual, channels_per_chunk=64)


LAYERS: dict[str, CompressedLinear] = {
    "weight alone": CompressedLinear(weight=uniform(), low_rank=None, activations=None),
    "3 bits, a branch": CompressedLinear(weight=uniform(3, None), low_rank=floats(), activations=None),
    "int8 factors": CompressedLinear(weight=uniform(), low_rank=integers(8), activations=None),
    "int4 factors": CompressedLinear(weight=uniform(), low_rank=integers(4), activations=None),
    "signs": CompressedLinear(weight=sign(), low_rank=floats(), activations=None),
    "inputs of 4 bits": CompressedLinear(
        weight=uniform(), low_rank=floats(), activations=ActivationFormat(bits=4, clip=0.9)
    ),
    "inputs in groups": CompressedLinear(
        weight=uniform(), low_rank=floats(), activations=ActivationFormat(bits=8, group_size=32)
    ),
    "a Hadamard transform": CompressedLinear(
        weight=uniform(), low_rank=floats(), activations=ActivationFormat(bits=8), transform=Hadamard(size=IN, seed=3)
    ),
}


def expected(layer: CompressedLinear, x: Tensor) -> Tensor:
    """The layer's output in float64, without its residual store."""
    if layer.transform is not None:
        x = (x.double() @ layer.transform.dense()).float()
    return linear(x, layer.weight, low_rank=layer.low_rank, activations=layer.activations)
