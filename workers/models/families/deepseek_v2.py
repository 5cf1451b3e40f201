"""DeepSeek-V2: DeepSeek-V3 whose router has no correction bias and scores a group by its best expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from counterweight.workers.models.families import deepseek_v3


def size_problem(sizes: Mapping[str, int]) -> str | None:
    """What transformers builds and cannot run."""
    return deepseek_v3.latent_attention_problem(sizes) or deepseek_v3.routing_problem(sizes, least=1)


FAMILY = replace(
    deepseek_v3.FAMILY,
    model_types=("deepseek_v2",),
    size_problem=size_problem,
    only={"topk_method": ("greedy", "group_limited_greedy")},
    prediction_layers=None,
)
