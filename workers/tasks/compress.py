"""A block, from its calibration to a finished checkpoint shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import COMPRESS, BlockRecord, BlockSpec, BlockTask
from counterweight.workers.tasks.propagate import PropagatedRecord
from counterweight.workers.tasks.solve import SolvedRecord
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Compress(BlockTask, DurableTask[BlockRecord]):
    """Solves every linear of a block and stores what a checkpoint, an adapter and a residual store hold of it. What this worker
    has just calibrated is not calibrated again; done elsewhere or by a process that died, it has the same bits. A block that
    workers have shared is put together."""

    kind: ClassVar[str] = COMPRESS
    record: ClassVar[type[BlockRecord]] = BlockRecord

    following: BlockSpec | None = None
    """The block that its worker probably begins with next, whose weights it may read meanwhile; no part of the result."""
    beside: str = ""
    """Name of another job that the block is compressed for, beside the one that runs: what was calibrated then stays in memory,
    for that one's own. Of blocks that are solved in one pass and train nothing. No part of the result."""
    solved: tuple[SolvedRecord, ...] = ()
    propagated: tuple[PropagatedRecord, ...] = ()
    """What others have made of a block that they share: all its linears, and all hidden states behind it, in order. Empty:
    nothing. No part of the result."""

    @property
    def name(self) -> str:
        return f"{super().name}, for {self.beside}" if self.beside else super().name

    def key(self) -> str:
        return self.block.key()

    def compute(self, context: TaskContext, workspace: Workspace) -> BlockRecord:
        from counterweight.workers.compressed_block import compressed
        from counterweight.workers.divided_block import joined

        if self.solved:
            return joined(context, self.block, self.solved, self.propagated, workspace)
        return compressed(context, self.block, workspace, following=self.following, keep=bool(self.beside))
