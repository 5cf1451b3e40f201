"""Qwen3.5-MoE with its vision model: the text model is compressed."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import qwen3_5, qwen3_5_moe_text

FAMILY = replace(
    qwen3_5_moe_text.FAMILY,
    model_types=("qwen3_5_moe",),
    names=qwen3_5.FAMILY.names,
    wrapper=replace(qwen3_5.WRAPPER, text_types=("qwen3_5_moe_text",)),
)
