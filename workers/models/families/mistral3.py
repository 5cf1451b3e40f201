"""Mistral 3 (Mistral Small 3.1 and 3.2) with its vision tower: the text model, Mistral, is compressed."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import llama
from counterweight.workers.models.wrapper import INNER_NAMES, Wrapper

FAMILY = replace(
    llama.FAMILY,
    model_types=("mistral3",),
    names=INNER_NAMES,
    wrapper=Wrapper(
        text_types=("mistral",),
        beside=("vision_tower", "multi_modal_projector"),
        writes=("multi_modal_projector.linear_2",),
    ),
)
