"""Share of positions at which the model and the original have the same most probable next token."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Comparison, Metric, mean


def _agreement(window: Comparison) -> float:
    return float(window.agreed.double().mean())


METRIC = Metric(
    name="top1_agreement",
    label="top-1 agreement",
    short="top-1 agreement",
    digits=".4f",
    of_window=_agreement,
    over_windows=mean,
    higher_is_better=True,
    description="Smallest share of positions with the original's most probable next token; null: no bound.",
)
