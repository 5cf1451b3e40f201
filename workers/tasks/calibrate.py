"""The original block over its inputs: its outputs, and what solving needs to know of each linear's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import CALIBRATE, BlockTask
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Calibrate(BlockTask, DurableTask[HiddenRecord]):
    """Runs the original block, gathers the statistics, which stay with this worker, and stores the outputs, which the block
    behind waits for. Done even where its record is there: it is asked for where the statistics or the outputs are not.

    ValueError unless the block's outputs are the original's.
    """

    kind: ClassVar[str] = CALIBRATE
    record: ClassVar[type[HiddenRecord]] = HiddenRecord

    def key(self) -> str:
        return self.block.calibrate_key()

    def run(self, context: TaskContext) -> HiddenRecord:
        workspace = self.workspace()
        return workspace.commit(self.kind, self.key(), self.compute(context, workspace))

    def compute(self, context: TaskContext, workspace: Workspace) -> HiddenRecord:
        from counterweight.workers.calibrated_block import calibrated

        block = self.block
        if block.propagate != "original":
            raise ValueError(
                f"block {block.index}: propagate {block.propagate}: expected original, where blocks are calibrated apart"
            )
        found = calibrated(context, block, workspace)
        context.held.hold(found)
        return HiddenRecord(outputs=found.outputs, timing=found.timing)
