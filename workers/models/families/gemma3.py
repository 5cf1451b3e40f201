"""Gemma 3 with its vision tower: the text model is compressed."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import gemma3_text
from counterweight.workers.models.wrapper import INNER_NAMES, Wrapper

FAMILY = replace(
    gemma3_text.FAMILY,
    model_types=("gemma3",),
    names=INNER_NAMES,
    wrapper=Wrapper(text_types=("gemma3_text",), beside=("vision_tower", "multi_modal_projector")),
)
