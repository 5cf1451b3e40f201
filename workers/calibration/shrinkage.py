"""Statistics of few tokens, shrunk toward those of the tokens that they stand among.

An expert that the router sent n tokens has the Gram matrix G of rank n at most: solved on it, it is exact on these tokens and
arbitrary elsewhere. With the mean L of x x^T over tokens of its layer, as the expert would see them, G + n0 L is the posterior
of a covariance with an inverse Wishart prior of n0 tokens around L, up to its scale, and n0 L is what an expert without tokens
is solved on (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, with another
target).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.quantization.result import Fallback
from counterweight.workers.tasks.records import STARVED


@dataclass(frozen=True, slots=True, kw_only=True)
class Starvation:
    """A linear of an expert that saw too little. tokens: that the router sent. floor: that were wanted. rows: of the layer that
    the expert was run on beside. weight: of these rows together, in tokens."""

    tokens: int
    floor: int
    rows: int
    weight: int

    @property
    def fallback(self) -> Fallback:
        """As a record."""
        return Fallback(
            step=STARVED,
            cause=f"{self.tokens} of {self.floor} tokens: statistics shrunk toward {self.rows} tokens of the layer, which "
            f"weigh as much as {self.weight}",
        )


def shrunk(own: InputStatistics, layer: InputStatistics, weight: int) -> InputStatistics:
    """`own` and the mean of `layer` times `weight`, which counts as so many tokens; of the magnitudes' thresholds the larger.

    Both of one width and gathered alike, though `own` may have no token and so no product but an empty xx. ValueError for
    another width or quantization, and for a layer without a token.
    """
    if layer.tokens < 1:
        raise ValueError("layer: no token: expected statistics to shrink toward")
    if own.width != layer.width or own.activations != layer.activations:
        raise ValueError(
            f"layer: expected width {own.width} and {own.activations}, not {layer.width}, {layer.activations}"
        )
    share = weight / layer.tokens
    thresholds = [found for found in (own.thresholds, layer.thresholds) if found is not None]
    return replace(
        own,
        gram=torch.add(own.gram, layer.gram, alpha=share),
        tokens=own.tokens + weight,
        others={name: product * share + own.others.get(name, 0.0) for name, product in layer.others.items()},
        absolute=None
        if layer.absolute is None
        else layer.absolute * share + (0.0 if own.absolute is None else own.absolute),
        thresholds=torch.stack(thresholds).amax(0) if thresholds else None,
    )
