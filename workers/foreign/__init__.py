"""Weights of other tools' checkpoints that are integer codes in words of 32 bits, decoded so that no tool of theirs is needed.

A format is a file: which configs speak of it, and how a linear layer is decoded from its tensors. Free of torch on import.
"""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.foreign.awq import awq
from counterweight.workers.foreign.format import PackedFormat
from counterweight.workers.foreign.gptq import gptq

__all__ = ["PackedFormat", "format_of"]


def format_of(quantization: Mapping[str, object]) -> PackedFormat | None:
    """The format of a checkpoint whose config.json has this `quantization_config`; None for one that is not decoded here."""
    return gptq(quantization) or awq(quantization)
