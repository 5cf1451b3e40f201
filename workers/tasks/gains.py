"""What branches could win in a block, for a budget that the whole model shares out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import GAINS, BlockTask
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class GainsRecord(Record):
    """Linear (name relative to the block) -> what each further rank of its branch would take off its relative error; and the
    hidden states behind the original block, one blob per shard."""

    gains: Mapping[str, tuple[float, ...]]
    outputs: tuple[Blob, ...]


class Gains(BlockTask, DurableTask[GainsRecord]):
    """Measures a block's gains on its statistics, where they are; calibrates it where they are not."""

    kind: ClassVar[str] = GAINS
    record: ClassVar[type[GainsRecord]] = GainsRecord

    keep: bool = False
    """Whether the statistics stay in memory, for the block to be compressed from them; no part of the result."""

    def key(self) -> str:
        return self.block.key()

    def compute(self, context: TaskContext, workspace: Workspace) -> GainsRecord:
        from counterweight.workers.calibrated_block import branch_gains, calibrated

        held = calibrated(context, self.block, workspace)
        gains = branch_gains(context, self.block, held, workspace)
        context.held.hold(held, keep=self.keep)
        return GainsRecord(gains=gains, outputs=held.outputs)
