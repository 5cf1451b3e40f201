"""Kinds of input that layers get in real models, and stranger ones: rows of tokens, for properties that hold on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments

Draw = Callable[..., Tensor]


def _anisotropic(noise: Tensor, draw: Draw) -> Tensor:
    width = noise.shape[1]
    turn = torch.linalg.qr(draw(width, width)).Q
    return (noise * torch.logspace(1, -2, width)) @ turn.T


def _outlier_channels(noise: Tensor, draw: Draw) -> Tensor:
    scales = torch.ones(noise.shape[1])
    scales[draw(noise.shape[1]).topk(max(2, noise.shape[1] // 32)).indices] = 40.0
    return noise * scales


def _common_mean(noise: Tensor, draw: Draw) -> Tensor:
    return noise + 5 * draw(1, noise.shape[1])


def _heavy_tails(noise: Tensor, draw: Draw) -> Tensor:
    return noise / draw(len(noise), 1).abs().clamp_min(1 / 30)


def _rectified(noise: Tensor, draw: Draw) -> Tensor:
    del draw
    return noise.clamp_min(0)


def _nearly_low_rank(noise: Tensor, draw: Draw) -> Tensor:
    rank = max(1, noise.shape[1] // 8)
    return draw(len(noise), rank) @ draw(rank, noise.shape[1]) + 0.01 * noise


def _duplicated(noise: Tensor, draw: Draw) -> Tensor:
    del draw
    half = noise[:, : noise.shape[1] // 2]
    return torch.cat([half, half], dim=1)


def _dead_channels(noise: Tensor, draw: Draw) -> Tensor:
    del draw
    alive = torch.ones(noise.shape[1])
    alive[::5] = 0
    return noise * alive


def _correlated(noise: Tensor, draw: Draw) -> Tensor:
    del draw
    return 0.3 * noise + noise.sum(1, keepdim=True) / noise.shape[1] ** 0.5 / 3


def _sparse(noise: Tensor, draw: Draw) -> Tensor:
    return noise * (draw(*noise.shape) > 1.0)


KINDS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "isotropic": lambda noise, draw: noise,
    "anisotropic": _anisotropic,
    "outlier channels": _outlier_channels,
    "common mean": _common_mean,
    "heavy tails": _heavy_tails,
    "rectified": _rectified,
    "nearly low rank": _nearly_low_rank,
    "duplicated channels": _duplicated,
    "dead channels": _dead_channels,
    "correlated": _correlated,
    "sparse": _sparse,
}


class Layer:
    """A weight [rows, width] with tokens that calibration sees and others that it does not, of one kind of input."""

    def __init__(
        self, kind: str, *, bits: int | None, rows: int = 96, width: int = 96, tokens: int = 4096, seed: int = 0
    ) -> None:
        source = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source)

        self.weight = draw(rows, width) / width**0.5
        inputs = KINDS[kind](draw(2 * tokens, width), draw)
        self.seen, self.unseen = inputs[:tokens], inputs[tokens:]
        self.activations = None if bits is None else ActivationFormat(bits=bits)
        gathering = Gathering(activations=self.activations, absolute=True, thresholds=True)
        accumulator = Accumulator(width, gathering=gathering)
        accumulator.add(ShardMoments.of(self.seen, gathering))
        self.statistics: InputStatistics = accumulator.result()

    def error(self, inputs: Tensor, codes: Tensor, branch: Tensor | None = None) -> float:
        """||W x - Q y - L x||^2 / ||W x||^2 over the rows of `inputs`, in float64."""
        quantized = inputs if self.activations is None else fake_quantize_activations(inputs, self.activations)
        exact = inputs.double() @ self.weight.double().T
        left = exact - quantized.double() @ codes.double().T
        if branch is not None:
            left = left - inputs.double() @ branch.double().T
        return float(left.square().sum() / exact.square().sum())
