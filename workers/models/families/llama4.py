"""Llama 4 with its vision model: the text model is compressed."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import llama4_text
from counterweight.workers.models.wrapper import TextNames, Wrapper

FAMILY = replace(
    llama4_text.FAMILY,
    model_types=("llama4",),
    names=(TextNames("language_model.model.", "language_model.lm_head.weight"),),
    wrapper=Wrapper(
        text_types=("llama4_text",),
        beside=("vision_model", "multi_modal_projector"),
        writes=("multi_modal_projector.linear_1",),
    ),
)
