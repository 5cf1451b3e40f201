"""Tensors that hold one matrix after the other, such as all experts of a block, taken apart on their first axis.

What lies apart in a row-major file can be read apart: each is a byte range of its own.
"""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.checkpoint.header import TensorEntry


def apart(entry: TensorEntry) -> list[TensorEntry]:
    """Entries [1, ...] of the tensors on the first axis of `entry` [n, ...], in order; ValueError for a scalar."""
    if not entry.shape:
        raise ValueError(f"{entry.name}: a scalar: expected a tensor with a first axis")
    count, *rest = entry.shape
    length = entry.length // max(count, 1)
    return [
        replace(
            entry, name=f"{entry.name}[{place}]", shape=(1, *rest), start=entry.start + place * length, length=length
        )
        for place in range(count)
    ]
