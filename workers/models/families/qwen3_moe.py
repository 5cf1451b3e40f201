"""Qwen3-MoE: blocks are dense or sparse by configuration."""

from __future__ import annotations

from counterweight.workers.models.family import (
    ATTENTION,
    GATED_MLP,
    SPARSE_DOWN,
    SPARSE_READERS,
    ExpertLayout,
    ModelFamily,
)

FAMILY = ModelFamily(
    model_types=("qwen3_moe",),
    groups=(*ATTENTION, *GATED_MLP),
    reads={"input_layernorm": ATTENTION[0], "post_attention_layernorm": (*GATED_MLP[0], *SPARSE_READERS)},
    down=(*GATED_MLP[1], *SPARSE_DOWN),
    sizes=("moe_intermediate_size",),
    experts=ExpertLayout(count_key="num_experts"),
)
