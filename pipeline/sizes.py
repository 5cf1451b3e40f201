"""How large an artifact will be, from shapes and the recipe alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from counterweight.pipeline.model_source import ModelSource
from counterweight.workers.footprint import Load
from counterweight.workers.footprint.load import Group, factors, packed

KEPT = 2
"""Bytes of a number of the blocks that stays as it is: bfloat16 or float16."""


def source_bytes(source: ModelSource) -> int:
    """Of all tensors that count."""
    return sum(source.checkpoint.entry(name).length for name in source.tensors)


def quantized_parameters(loads: Iterable[Load]) -> int:
    """Weights of the linears that blocks quantize."""
    return sum(prod(group.linears[name]) for load in loads for group in load.groups for name in group.recipe)


def quantized_bytes(loads: Iterable[Load]) -> int:
    """What takes their place: codes and scales, branches (of ranks that are yet to be chosen, at most) and residual stores."""
    return sum(packed(group) + factors(group) + _stores(group) for load in loads for group in load.groups)


def kept_bytes(source: ModelSource, in_blocks: int) -> int:
    """What is carried over. in_blocks: numbers of the blocks that are not quantized."""
    ends = source.layout.family.ends.intersection(source.tensors)
    return sum(source.checkpoint.entry(name).length for name in (*ends, *source.beside)) + KEPT * in_blocks


def _stores(group: Group) -> int:
    """Codes of a residual store, and a scale of two bytes for each output."""
    return sum(
        rows * columns * part.residual.bits // 8 + 2 * rows
        for name, part in group.recipe.items()
        if part.residual is not None
        for rows, columns in (group.linears[name],)
    )
