"""Quantization of a linear layer's input. `workers/calibration/clipping.py` and `kernels/reference.py` have the mathematics."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from counterweight.workers.config import Method
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise

CLIPS = tuple(1 - step / 20 for step in range(11))
"""Shares that a search tries: 1, 0.95, .. 0.5."""


class Activations(Method):
    """Dynamic, symmetric quantization of the inputs of quantized layers; absent: weight-only."""

    VERSION: ClassVar[int] = 1

    bits: Literal[4, 6, 8] = 8
    """Bits of an activation code."""
    clip: Annotated[float, Field(strict=True, gt=0, le=1)] | Literal["search"] = 1.0
    """Share of a token's largest magnitude that the codes reach; `search` finds, for each distinct input, the one among
    1, 0.95, .. 0.5 with the smallest squared error on up to 2,048 tokens of the first shard. Stock loaders know only 1."""
    group_size: Annotated[int, Field(strict=True, gt=0, multiple_of=32)] | None = None
    """Channels of a token that share a scale, a multiple of 32; null: one scale per token. Stock loaders know only null."""

    def quantize_flops(self, entries: float) -> Work:
        """Arithmetic of quantizing so many activations, and of multiplying them out again."""
        return elementwise(6 * entries)

    def clip_flops(self, entries: float) -> Work:
        """Arithmetic of choosing the clip of an input of which so many activations are looked at."""
        if self.clip != "search":
            return NOTHING
        return (self.quantize_flops(entries) + elementwise(3 * entries)) * len(CLIPS)
