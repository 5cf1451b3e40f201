"""GLM-4.5: attention with a rotary embedding of half of each head; MLPs and routing are DeepSeek-V3's."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.models.families.deepseek_v3 import SHARED_EXPERTS, routing_problem
from counterweight.workers.models.family import (
    ATTENTION,
    GATED_MLP,
    SPARSE_DOWN,
    SPARSE_READERS,
    ExpertLayout,
    ModelFamily,
)


def size_problem(sizes: Mapping[str, int]) -> str | None:
    """What transformers builds and cannot run."""
    return routing_problem(sizes, least=2)


FAMILY = ModelFamily(
    model_types=("glm4_moe",),
    groups=(*ATTENTION, *GATED_MLP, *SHARED_EXPERTS),
    reads={
        "input_layernorm": ATTENTION[0],
        "post_attention_layernorm": (*GATED_MLP[0], *SPARSE_READERS, *SHARED_EXPERTS[0]),
    },
    down=(*GATED_MLP[1], *SPARSE_DOWN, *SHARED_EXPERTS[1]),
    labels={"mlp.shared_experts.": "shared experts: "},
    sizes=("moe_intermediate_size", "n_shared_experts", "n_group", "topk_group"),
    size_problem=size_problem,
    partial_rotary=True,
    prediction_layers="num_nextn_predict_layers",
    experts=ExpertLayout(count_key="n_routed_experts"),
)
