"""Work that is divided by bytes: neighbours together, so that each task is worth its start and there are enough for all."""

from __future__ import annotations

from collections.abc import Sequence

TASK_BYTES = 1 << 30
"""That one task reads: enough to keep a worker busy, small enough to spread a model over many."""


def neighbours(sizes: Sequence[int], most: int) -> list[range]:
    """Places of `sizes` in order, together as long as they are no more than `most` bytes; one that is larger is alone."""
    found: list[range] = []
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > most:
            found.append(range(start, place))
            start, total = place, 0
        total += size
    return [*found, range(start, len(sizes))] if sizes else found
