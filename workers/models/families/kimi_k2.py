"""Kimi-K2: DeepSeek-V3 under a name of its own, which transformers does not know; an artifact has DeepSeek-V3's."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, model_types=("kimi_k2",), known_as="deepseek_v3")
