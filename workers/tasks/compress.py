"""A block, from its calibration to a finished checkpoint shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import COMPRESS, BlockRecord, BlockSpec, BlockTask
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Compress(BlockTask, DurableTask[BlockRecord]):
    """Solves every linear of a block and stores what a checkpoint, an adapter and a residual store hold of it. What this worker
    has just calibrated is not calibrated again; done elsewhere or by a process that died, it has the same bits."""

    kind: ClassVar[str] = COMPRESS
    record: ClassVar[type[BlockRecord]] = BlockRecord

    following: BlockSpec | None = None
    """The block that its worker probably begins with next, whose weights it may read meanwhile; no part of the result."""

    def key(self) -> str:
        return self.block.key()

    def compute(self, context: TaskContext, workspace: Workspace) -> BlockRecord:
        from counterweight.workers.compressed_block import compressed

        return compressed(context, self.block, workspace, self.following)
