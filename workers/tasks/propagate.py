"""A compressed block over a stretch of its shards, for the block behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import COMPRESS, BlockRecord, BlockTask
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.solve import SolvedRecord
from counterweight.workers.tasks.task import Task, committed
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class PropagatedRecord(Record):
    """Hidden states behind a compressed block, and behind the original one where its inputs are passed on too: one blob for
    each shard of a stretch."""

    outputs: tuple[Blob, ...]
    original_outputs: tuple[Blob, ...] = ()
    timing: Timing

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        return (*self.outputs, *self.original_outputs)


class Propagate(BlockTask, Task[PropagatedRecord]):
    """Runs a block whose linears others have solved over its shards from `start` to before `stop`. What it gives back is
    committed with the block."""

    kind: ClassVar[str] = "propagate"

    solved: tuple[SolvedRecord, ...]
    """All linears of the block."""
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{super().name}, shards {self.start} to {self.stop - 1} of {len(self.block.inputs)}"

    def lookup(self, workspace: Workspace) -> PropagatedRecord | None:
        block = committed(workspace, COMPRESS, self.block.key(), BlockRecord)
        if block is None:
            return None
        stretch = slice(self.start, self.stop)
        return PropagatedRecord(
            outputs=block.outputs[stretch], original_outputs=block.original_outputs[stretch], timing=block.timing
        )

    def run(self, context: TaskContext) -> PropagatedRecord:
        from counterweight.workers.divided_block import propagated_stretch

        return propagated_stretch(context, self.block, self.solved, range(self.start, self.stop), self.workspace())
