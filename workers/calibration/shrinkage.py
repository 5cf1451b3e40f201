"""Statistics of few tokens, shrunk toward those of the tokens that they stand among.

An expert that the router sent n tokens has the Gram matrix G of rank n at most: solved on it, it is exact on these tokens and
arbitrary elsewhere. With the mean L of x x^T over tokens of its layer, as the expert would see them, G + n0 L is the posterior
of a covariance with an inverse Wishart prior of n0 tokens around L, up to its scale, and n0 L is what an expert without tokens
is solved on (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, with another
target).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from counterweight.workers.calibration.experts import Starvation
from counterweight.workers.calibration.statistics import PackedMoments
from counterweight.workers.calibration.triangle import LowerTriangle


def shrunk(own: PackedMoments, layer: PackedMoments, starvation: Starvation) -> PackedMoments:
    """`own` and the mean of `layer` times `starvation.weight`, which counts as so many tokens; of the thresholds of magnitudes
    the larger. The sums of `own` are used up: the result is in their memory.

    Both of one width and gathered alike, though `own` may have no token and so no product but an empty xx. ValueError for
    another width or quantization, and for a layer without a token.
    """
    if layer.tokens < 1:
        raise ValueError("layer: no token: expected statistics to shrink toward")
    if own.width != layer.width or own.activations != layer.activations:
        raise ValueError(
            f"layer: expected width {own.width} and {own.activations}, not {layer.width}, {layer.activations}"
        )
    share = starvation.weight / layer.tokens
    triangles, crossed = dict(own.triangles), dict(own.crossed)
    for name, triangle in layer.triangles.items():
        sum_ = triangles.setdefault(name, LowerTriangle.zeros(own.width, torch.float64, triangle.entries.device))
        sum_.add_(triangle, share)
    for name, product in layer.crossed.items():
        crossed[name] = crossed.setdefault(name, torch.zeros_like(product)).add_(product, alpha=share)
    absolute = layer.absolute
    if absolute is not None:
        absolute = absolute * share + (0.0 if own.absolute is None else own.absolute)
    thresholds = [found for found in (own.thresholds, layer.thresholds) if found is not None]
    return replace(
        own,
        triangles=triangles,
        crossed=crossed,
        tokens=own.tokens + starvation.weight,
        absolute=absolute,
        thresholds=torch.stack(thresholds).amax(0) if thresholds else None,
        starvation=starvation,
    )
