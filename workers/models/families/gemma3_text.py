"""Gemma 3, the text model: Gemma 2 without the soft-capping of attention's logits."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import gemma2

FAMILY = replace(gemma2.FAMILY, model_types=("gemma3_text",), eager_attention=False)
