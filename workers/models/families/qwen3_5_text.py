"""Qwen3.5, the text model: as Qwen3-Next, with dense MLPs and its DeltaNet's projections apart."""

from __future__ import annotations

from counterweight.workers.models.families import llama
from counterweight.workers.models.families.qwen3_next import with_delta_net
from counterweight.workers.models.family import SharedInputGroup

DELTA_NET_INPUTS: SharedInputGroup = (
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_b",
    "linear_attn.in_proj_a",
)

FAMILY = with_delta_net(llama.FAMILY, ("qwen3_5_text",), DELTA_NET_INPUTS)
