"""Perplexity: exp of the mean over windows of the mean negative log-likelihood of their tokens but the first."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from counterweight.workers.metrics.metric import Comparison, Metric, mean


def _negative_log_likelihood(window: Comparison) -> float:
    """Mean over tokens, in nats; sums in float64."""
    import torch

    return float(-window.likelihood.mean(dtype=torch.float64))


def _perplexity(values: Sequence[float]) -> float:
    return exp(mean(values))


METRIC = Metric(
    name="perplexity",
    label="perplexity",
    short="perplexity",
    digits=".4f",
    of_window=_negative_log_likelihood,
    over_windows=_perplexity,
    relative=True,
    description="Largest perplexity of the compressed model, as a multiple of the original's; null: no bound.",
)
