"""What a model is judged by: a file each, and one line here. Free of torch, which is imported where numbers are computed."""

from __future__ import annotations

from counterweight.workers.metrics import kl, kl_p99, perplexity, router_agreement, top1_agreement
from counterweight.workers.metrics.metric import Comparison, Metric

__all__ = ["METRICS", "Comparison", "Metric"]

METRICS: tuple[Metric, ...] = (
    perplexity.METRIC,
    kl.METRIC,
    kl_p99.METRIC,
    top1_agreement.METRIC,
    router_agreement.METRIC,
)
"""In the order in which people see them."""
