"""The original block over shards of its inputs: their outputs, and what solving needs to know of each linear's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import CALIBRATE, BlockTask
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Calibrate(BlockTask, Task[HiddenRecord]):
    """Runs the original block over a stretch of its shards, adds their moments to those of the shards before, which stay with
    this worker, and stores the outputs, which the block behind waits for.

    A worker that does not hold the sums of the shards before runs the block over these too, to the same bits. A record is
    committed with the last stretch, of the whole block: how shards are divided is no part of a result. Done even where it is
    there: the task is asked for where the statistics or the outputs are not. ValueError unless the block's outputs are the
    original's.
    """

    kind: ClassVar[str] = CALIBRATE

    shards: int
    """How many there are in all. `block.inputs` are those that are known, as far as this stretch at least."""
    start: int = 0
    stop: int
    """Of the stretch."""
    passing: bool = False
    """Whether only the outputs are wanted, and no statistics."""

    @property
    def name(self) -> str:
        whole = self.stop - self.start == self.shards
        return super().name if whole else f"{super().name}, shards {self.start} to {self.stop - 1} of {self.shards}"

    def lookup(self, workspace: Workspace) -> HiddenRecord | None:
        if len(self.block.inputs) < self.shards:
            return None
        found = workspace.lookup(self.kind, self.block.calibrate_key(), HiddenRecord)
        return None if found is None else self._own(found)

    def run(self, context: TaskContext) -> HiddenRecord:
        from counterweight.workers.calibrated_block import calibrated
        from counterweight.workers.passing import waits

        block, workspace = self.block.before(self.stop), self.block.setting.open_workspace()
        if self.passing:
            block = block.model_copy(update={"recipe": {}, "passes": ()})
        if block.propagate != "original":
            raise ValueError(
                f"block {block.index}: propagate {block.propagate}: expected original, where blocks are calibrated apart"
            )
        found = context.held.take(block.statistics_key())
        if found is not None and not all(waits(context, workspace, blob) for blob in found.outputs):
            found = None  # a job that shares them was published since, and has discarded them
        if found is None:
            found = calibrated(context, block, workspace, start=self.start, more=self.stop < self.shards)
        context.held.hold(found)
        record = HiddenRecord(outputs=found.outputs, timing=found.timing)
        if self.stop == self.shards:
            record = workspace.commit(self.kind, block.calibrate_key(), record)
        return self._own(record)

    def _own(self, record: HiddenRecord) -> HiddenRecord:
        """The stretch's part of the block's outputs."""
        return record.model_copy(update={"outputs": record.outputs[self.start : self.stop]})
