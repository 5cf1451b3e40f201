"""Qwen2-MoE: Qwen3-MoE with a shared expert in sparse blocks, behind a gate of its own, which is a linear with one output."""

from __future__ import annotations

from counterweight.workers.models.family import (
    ATTENTION,
    GATED_MLP,
    SPARSE_DOWN,
    SPARSE_READERS,
    ExpertLayout,
    ModelFamily,
    SharedInputGroup,
)

SHARED_EXPERT: tuple[SharedInputGroup, ...] = (
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
)

FAMILY = ModelFamily(
    model_types=("qwen2_moe",),
    groups=(*ATTENTION, *GATED_MLP, *SHARED_EXPERT),
    reads={
        "input_layernorm": ATTENTION[0],
        "post_attention_layernorm": (
            *GATED_MLP[0],
            *SPARSE_READERS,
            *SHARED_EXPERT[0],
            "mlp.shared_expert_gate",
        ),
    },
    down=(*GATED_MLP[1], *SPARSE_DOWN, *SHARED_EXPERT[1]),
    labels={"mlp.shared_expert.": "shared expert: "},
    sizes=("moe_intermediate_size", "shared_expert_intermediate_size"),
    experts=ExpertLayout(count_key="num_experts", routers=("re:.*[.]gate$", "re:.*[.]shared_expert_gate$")),
)
