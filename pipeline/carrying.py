"""What it takes to carry tensors over into an artifact, for `Task.patience`: bounds that nothing exceeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from counterweight.pipeline.model_source import ModelSource
from counterweight.workers.matrix_bytes import SINGLE


@dataclass(frozen=True, slots=True)
class Carrying:
    """bytes: that are read and written. flops: floating-point operations."""

    bytes: int
    flops: int


def carrying(source: ModelSource, names: Sequence[str], *, rotated: bool) -> Carrying:
    """Of the tensors `names`, written in float32; where they are rotated each row is multiplied by a matrix [hidden_size,
    hidden_size]."""
    entries = [source.checkpoint.entry(name) for name in names]
    elements = sum(prod(entry.shape) for entry in entries)
    return Carrying(
        bytes=sum(entry.length for entry in entries) + SINGLE * elements,
        flops=2 * elements * source.layout.hidden_size if rotated else 0,
    )
