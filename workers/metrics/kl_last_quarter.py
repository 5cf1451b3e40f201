"""How far the model is from the original where windows end: errors that grow with the context show here first."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Comparison, Metric, mean


def _late_divergence(window: Comparison) -> float:
    """Mean over the last quarter of the window's positions, at least one, in nats."""
    import torch

    late = max(1, len(window.divergence) // 4)
    return max(float(window.divergence[-late:].mean(dtype=torch.float64)), 0.0)


METRIC = Metric(
    name="kl_last_quarter",
    label="KL over the last quarter of a window",
    short="KL, last quarter",
    digits=".5f",
    of_window=_late_divergence,
    over_windows=mean,
    description="Largest mean divergence over the last quarter of a window's positions, in nats; null: no bound.",
)
