"""Phi-3: queries, keys and values in one linear, gate and up in another."""

from __future__ import annotations

from counterweight.workers.models.family import ModelFamily

FAMILY = ModelFamily(
    model_types=("phi3",),
    groups=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    reads={"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
    down=("mlp.down_proj",),
    value="self_attn.qkv_proj",
    values="last",
    up="gate_up_proj",
    partial_rotary=True,
)
