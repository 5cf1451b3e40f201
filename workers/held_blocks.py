"""Calibrated blocks in a worker's memory: the last one, and those that wait for a budget of bits to be shared out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.workers.calibrated_block import CalibratedBlock

HOLD_BYTES = 2 << 30
"""Statistics and weights that a worker keeps of blocks that wait for a budget to be shared out, beside the block that it works
on. What does not fit is calibrated a second time, to the same bits."""


class HeldBlocks:
    """Blocks by `CalibratedBlock.key`, oldest first. limit: bytes of those that are kept."""

    def __init__(self, limit: int = HOLD_BYTES) -> None:
        self._limit = limit
        self._blocks: dict[str, CalibratedBlock] = {}
        self._kept: set[str] = set()

    def hold(self, block: CalibratedBlock, *, keep: bool = False) -> None:
        """Holds a block until `make_room`, or beyond that where it is to be kept and there is room."""
        self._blocks[block.key] = block
        if keep:
            self._kept.add(block.key)

    def take(self, key: str) -> CalibratedBlock | None:
        """The block of this key, held no longer; None when there is none."""
        self._kept.discard(key)
        return self._blocks.pop(key, None)

    def make_room(self) -> bool:
        """Before a further block is calibrated: drops what is not kept, then the oldest, until the rest is within the limit.
        Whether it has dropped anything."""
        before = len(self._blocks)
        for key in list(self._blocks):
            if key not in self._kept or sum(block.bytes for block in self._blocks.values()) > self._limit:
                self.take(key)
        return len(self._blocks) < before

    def clear(self) -> None:
        """Drops everything."""
        self._blocks.clear()
        self._kept.clear()
