"""The original block over its inputs: its outputs, and what solving needs to know of each linear's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import CALIBRATE, BlockTask
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.task import Task

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Calibrate(BlockTask, Task[HiddenRecord]):
    """Runs the original block, gathers the statistics, which stay with this worker, and stores the outputs, which the block
    behind waits for. Done even where its record is there: it is asked for where the statistics or the outputs are not.

    ValueError unless the block's outputs are the original's.
    """

    kind: ClassVar[str] = CALIBRATE

    def run(self, context: TaskContext) -> HiddenRecord:
        from counterweight.workers.calibrated_block import calibrated

        block = self.block
        if block.propagate != "original":
            raise ValueError(
                f"block {block.index}: propagate {block.propagate}: expected original, where blocks are calibrated apart"
            )
        workspace = self.workspace()
        found = calibrated(context, block, workspace)
        record = HiddenRecord(outputs=found.outputs, timing=found.timing)
        return workspace.commit(self.kind, block.calibrate_key(), record)
