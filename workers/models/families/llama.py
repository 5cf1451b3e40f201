"""Llama, and what is built like it: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from counterweight.workers.models.family import ATTENTION, GATED_MLP, ModelFamily

FAMILY = ModelFamily(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    groups=(*ATTENTION, *GATED_MLP),
    reads={"input_layernorm": ATTENTION[0], "post_attention_layernorm": GATED_MLP[0]},
    down=GATED_MLP[1],
)
