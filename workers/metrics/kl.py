"""Mean Kullback-Leibler divergence from the original's next-token distribution."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Comparison, Metric, mean


def _mean_divergence(window: Comparison) -> float:
    """In nats; below zero only by rounding."""
    import torch

    return max(float(window.divergence.mean(dtype=torch.float64)), 0.0)


METRIC = Metric(
    name="kl",
    label="KL, nats per token",
    short="KL",
    digits=".5f",
    of_window=_mean_divergence,
    over_windows=mean,
    description=(
        "Largest mean Kullback-Leibler divergence from the original's next-token distribution, in nats; null: no bound."
    ),
)
