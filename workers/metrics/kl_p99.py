"""How far the worst positions are from the original: the 99th percentile of the divergence, where the mean hides a few."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Comparison, Metric, mean


def _high_divergence(window: Comparison) -> float:
    """The 99th percentile over the window's positions, in nats; interpolated between two positions."""
    return max(float(window.divergence.double().quantile(0.99)), 0.0)


METRIC = Metric(
    name="kl_p99",
    label="KL, 99th percentile of a window, mean over windows",
    short="KL p99",
    digits=".5f",
    of_window=_high_divergence,
    over_windows=mean,
    description=(
        "Largest 99th percentile of the divergence over the positions of a window, mean over windows, in nats; null: no bound."
    ),
)
