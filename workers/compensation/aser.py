"""ASER's error reconstruction: outlier columns out of the codes, everything that is left out into one whitened SVD.

Zhao et al., "ASER: Activation Smoothing and Error Reconstruction" (AAAI 2025). The input channels that are largest in
activations and weights cause orders of magnitude more error than the others. Their columns W_o are not quantized:

    W = W_s + W_o,    Q = quantize(W_s),    L = the reduced-rank regression of W_o + (W_s - Q) on the layer's input.

Before that, the input of those channels is divided by `outlier_scales` and their columns multiplied (activation smoothing),
where `workers.transforms.smoothing` can; the quantized activations of all channels get finer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.methods.compensations import ASER


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOut:
    """channels: of the input, int64, ascending. scales: by what the input may be divided, [in] float64; None: as it is."""

    channels: Tensor
    scales: Tensor | None


def outlier_channels(weights: Sequence[Tensor], magnitude: Tensor, options: ASER) -> Tensor:
    """The input channels with the largest E|x_i|, or E|x_i| * mean_o |W_oi|, int64, ascending.

    As many as the options ask for, but at most half of all and of the smallest branch's rank.

    weights: the matrices [out, in] that read the input; they share the choice, because they share the input.
    magnitude: E|x|, [in].
    """
    score = magnitude.double()
    if options.choose == "product":
        score = score * torch.cat([weight.abs() for weight in weights]).double().mean(0)
    count = min(options.outliers, len(score) // 2)
    if options.rank.known_ahead:
        fewest = min(len(weight) for weight in weights)
        count = min(count, options.rank.resolve(fewest, len(score), score) // 2)
    return score.topk(count).indices.sort().values


def outlier_scales(magnitude: Tensor, channels: Tensor, options: ASER) -> Tensor:
    """What the input is divided by, [in] float64: the outlier channels down to the reference, the others as they are."""
    found = magnitude.double()
    reference = found[channels].min() if options.reference == "minimum" else found.median()
    scales = torch.ones_like(found)
    if len(channels) and bool(reference > 0):
        scales[channels] = (found[channels] / reference).clamp_min(1)
    return scales


def without_channels(weight: Tensor, channels: Tensor) -> Tensor:
    """`weight` [out, in] with the columns `channels` set to zero."""
    return weight.index_fill(1, channels, 0.0)
