"""What a model is judged by: a file each, and one line here. Free of torch, which is imported where numbers are computed."""

from __future__ import annotations

from counterweight.workers.metrics import (
    kl,
    kl_by_position,
    kl_last_quarter,
    kl_p99,
    longest_common,
    perplexity,
    router_agreement,
    top1_agreement,
)
from counterweight.workers.metrics.metric import Comparison, Expected, Measure, Metric, Profile

__all__ = ["BOUNDED", "METRICS", "PROFILES", "Comparison", "Expected", "Measure", "Metric", "Profile"]

METRICS: tuple[Metric, ...] = (
    perplexity.METRIC,
    kl.METRIC,
    kl_p99.METRIC,
    kl_last_quarter.METRIC,
    top1_agreement.METRIC,
    router_agreement.METRIC,
)
"""Of text, in the order in which people see them."""

BOUNDED: tuple[Measure, ...] = (*METRICS, longest_common.MEASURE)
"""What the bounds of a manifest may name."""

PROFILES: tuple[Profile, ...] = (kl_by_position.PROFILE,)
"""What is measured along a window."""
