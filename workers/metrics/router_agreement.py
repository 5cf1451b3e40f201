"""Share of tokens that a router sends to the same experts as the original's, mean over sparse blocks."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Comparison, Metric, mean


def _agreement(window: Comparison) -> float | None:
    """None in a model without routers."""
    return mean(window.routed) if window.routed else None


METRIC = Metric(
    name="router_agreement",
    label="router agreement",
    short="router agreement",
    digits=".4f",
    of_window=_agreement,
    over_windows=mean,
    higher_is_better=True,
    sparse=True,
    description=(
        "Smallest share of tokens that a router sends to the same experts as the original's, mean over sparse blocks; null: no "
        "bound. Of sparse models alone."
    ),
)
