"""ASER's error reconstruction: outlier columns out of the codes, everything that is left out into one whitened SVD.

Zhao et al., "ASER: Activation Smoothing and Error Reconstruction" (AAAI 2025). A few input channels, the
largest in activations and weights, cause most of the error, the paper finds. Their columns W_o are not quantized:

    W = W_s + W_o,    Q = quantize(W_s),    L = the reduced-rank regression of W_o + (W_s - Q) on the layer's input.

Before that, the input of those channels is divided by `outlier_scales` and their columns multiplied (activation smoothing),
where `workers.transforms.smoothing` can: quantized activations get finer steps in every token that such a channel ruled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.result import CompensationResult
from counterweight.workers.compensation.svd import svd
from counterweight.workers.methods.compensations import ASER, SVD
from counterweight.workers.methods.compensations.rank import CountRank


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOut:
    """What one linear leaves out of its codes. channels: of the input, int64, ascending. scales: by what the input may be
    divided, [in] float64; None: as it is."""

    channels: Tensor
    scales: Tensor | None


def outlier_channels(weights: Sequence[Tensor], magnitude: Tensor, rows: int, options: ASER) -> Tensor:
    """The input channels with the largest E|x_i|, or E|x_i| * mean_o |W_oi|, int64, ascending.

    As many as the options ask for, but at most half of all and half of the largest rank that the branch of a linear with
    `rows` outputs can have: the branch must be able to give them back.

    weights: the matrices [out, in] that read the input; they share the order of its channels. magnitude: E|x|, [in].
    """
    score = magnitude.double()
    if options.choose == "product":
        score = score * torch.cat([weight.abs() for weight in weights]).double().mean(0)
    count = min(options.outliers, len(score) // 2, options.rank.at_most(rows, len(score)) // 2)
    return score.topk(count).indices.sort().values


def outlier_scales(magnitude: Tensor, channels: Tensor, options: ASER) -> Tensor:
    """What the input is divided by, [in] float64: the outlier channels down to the reference, the others as they are."""
    found = magnitude.double()
    reference = found[channels].min() if options.reference == "minimum" else found.median()
    scales = torch.ones_like(found)
    if len(channels) and bool(reference > 0):
        scales[channels] = (found[channels] / reference).clamp_min(1)
    return scales


def reconstruction(
    options: ASER, residual: Tensor, statistics: InputStatistics | None, taken: Tensor | None, dtype: torch.dtype
) -> CompensationResult:
    """The branch for `residual` [out, in] = W - Q, in which the columns `taken` are whole; see `svd`.

    A rank that the spectrum decides is that of what rounding left, and the columns that were taken out come on top: their
    energy is not what the option speaks of, and each takes a rank to give back.
    """
    plain = SVD(rank=options.rank, damping=options.damping, factor_bits=options.factor_bits)
    if taken is None or not len(taken) or options.rank.known_ahead:
        return svd(plain, residual, statistics, dtype)
    rounding = svd(plain, without_channels(residual, taken), statistics, dtype).low_rank
    count = min(len(taken) + (0 if rounding is None else rounding.rank), *residual.shape)
    return svd(plain.model_copy(update={"rank": CountRank(count=count)}), residual, statistics, dtype)


def without_channels(weight: Tensor, channels: Tensor) -> Tensor:
    """`weight` [out, in] with the columns `channels` set to zero."""
    return weight.index_fill(1, channels, 0.0)
