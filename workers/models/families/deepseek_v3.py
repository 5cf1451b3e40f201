"""DeepSeek-V3: latent attention (MLA), shared experts beside routed ones, routing in groups with a bias of its own.

Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries come from a latent of rank q_lora_rank (or, where that is null,
from the stream), keys and values from one of rank kv_lora_rank, each behind a norm of its own. kv_b_proj writes, head by head,
qk_nope_head_dim rows of keys and then v_head_dim rows of values. A router's e_score_correction_bias is a buffer of the module.
"""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.models.family import (
    GATED_MLP,
    SPARSE_DOWN,
    SPARSE_READERS,
    ExpertLayout,
    ModelFamily,
    SharedInputGroup,
)

LATENTS: SharedInputGroup = ("self_attn.q_a_proj", "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")
SHARED_EXPERTS: tuple[SharedInputGroup, ...] = (
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.shared_experts.down_proj",),
)


def size_problem(sizes: Mapping[str, int]) -> str | None:
    """What transformers builds and cannot run: sizes are as attention and the router cut them."""
    # A group's score is the sum of its two best experts'.
    return latent_attention_problem(sizes) or routing_problem(sizes, least=2)


def latent_attention_problem(sizes: Mapping[str, int]) -> str | None:
    """What is wrong with the sizes of latent attention, None when nothing is."""
    needed = ("qk_rope_head_dim", "v_head_dim")  # transformers lets them be null
    if (missing := next((field for field in needed if field not in sizes), None)) is not None:
        return f"{missing}: None: expected an integer"
    heads, rotated = sizes["num_attention_heads"], sizes["qk_rope_head_dim"]
    if sizes["num_key_value_heads"] != heads:
        return f"num_key_value_heads: {sizes['num_key_value_heads']}: expected {heads}, as num_attention_heads"
    if rotated % 2 or sizes["head_dim"] != rotated:
        return f"qk_rope_head_dim: {rotated}: expected an even number, and head_dim {sizes['head_dim']} to be the same"
    return None


def routing_problem(sizes: Mapping[str, int], *, least: int) -> str | None:
    """What is wrong with the sizes of routing in groups of at least `least` experts, None when nothing is."""
    needed = ("n_group", "topk_group")  # transformers lets them be null
    if (missing := next((field for field in needed if field not in sizes), None)) is not None:
        return f"{missing}: None: expected an integer"
    experts, groups = sizes["n_routed_experts"], sizes["n_group"]
    kept, active = sizes["topk_group"], sizes["num_experts_per_tok"]
    if experts % groups or experts // groups < least:
        return (
            f"n_group: {groups}: expected a divisor of n_routed_experts, {experts}, "
            f"that leaves {least} or more in a group"
        )
    if kept > groups or active > kept * (experts // groups):
        return (
            f"topk_group: {kept}: expected at most n_group, {groups}, "
            f"with num_experts_per_tok, {active}, or more experts in those groups"
        )
    return None


FAMILY = ModelFamily(
    model_types=("deepseek_v3",),
    groups=(
        LATENTS,
        ("self_attn.q_b_proj",),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
        *GATED_MLP,
        *SHARED_EXPERTS,
    ),
    sizes=(
        "moe_intermediate_size",
        "n_shared_experts",
        "n_group",
        "topk_group",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ),
    size_problem=size_problem,
    prediction_layers="num_nextn_predict_layers",
    reads={
        "input_layernorm": LATENTS,
        "post_attention_layernorm": (*GATED_MLP[0], *SPARSE_READERS, *SHARED_EXPERTS[0]),
    },
    latents={
        "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
        "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
    },
    value="self_attn.kv_b_proj",
    values="last of each head",
    down=(*GATED_MLP[1], *SPARSE_DOWN, *SHARED_EXPERTS[1]),
    labels={"mlp.shared_experts.": "shared experts: "},
    experts=ExpertLayout(count_key="n_routed_experts"),
)
