"""Qwen3.5 with its vision model: the text model is compressed."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.models.families import qwen3_5_text
from counterweight.workers.models.wrapper import INNER_NAMES, Wrapper

WRAPPER = Wrapper(text_types=("qwen3_5_text",), beside=("visual",), writes=("visual.merger.linear_fc2",))

FAMILY = replace(qwen3_5_text.FAMILY, model_types=("qwen3_5",), names=INNER_NAMES, wrapper=WRAPPER)
