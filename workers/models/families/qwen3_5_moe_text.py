"""Qwen3.5-MoE, the text model: Qwen3-Next with its DeltaNet's projections apart."""

from __future__ import annotations

from counterweight.workers.models.families import qwen2_moe
from counterweight.workers.models.families.qwen3_5_text import DELTA_NET_INPUTS
from counterweight.workers.models.families.qwen3_next import with_delta_net

FAMILY = with_delta_net(qwen2_moe.FAMILY, ("qwen3_5_moe_text",), DELTA_NET_INPUTS)
