"""Some of a block's linears, solved on one worker while others solve the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.formats import ModuleFormat
from counterweight.workers.keys import digest
from counterweight.workers.tasks.block import COMPRESS, BlockRecord, BlockSpec, BlockTask
from counterweight.workers.tasks.records import ModuleReport, Timing
from counterweight.workers.tasks.task import DurableTask, committed
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class SolvedRecord(Record):
    """Linears of a block as they are stored, and what else of the block lies beside them.

    blobs: of a checkpoint's tensors, an adapter's and residual stores', as far as there are any. formats: full module name, as
    stored -> format. modules: by names relative to the block. finished: whether this is what another job has finished of the
    block, which is there to stay.
    """

    blobs: tuple[Blob, ...]
    formats: Mapping[str, ModuleFormat]
    modules: tuple[ModuleReport, ...]
    timing: Timing
    finished: bool = False

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        """Like these, parts of a block are read by the tasks behind and discarded when the job is published."""
        return () if self.finished else self.blobs


class Solve(BlockTask, DurableTask[SolvedRecord]):
    """Gathers statistics of the inputs of some of a block's linears, and solves these; other workers do the others, each on
    forward passes of its own, so that no statistics travel. A block that somebody has finished is found in its place, however
    it was divided."""

    kind: ClassVar[str] = "solve"
    record: ClassVar[type[SolvedRecord]] = SolvedRecord

    linears: tuple[str, ...]
    """Those of one input together, and those of one expert."""
    part: int
    parts: int
    """Which it is of how many. The first has the tensors of the block that are kept, too."""
    following: BlockSpec | None = None
    """See `Compress`."""

    @property
    def name(self) -> str:
        return f"{super().name}, part {self.part + 1} of {self.parts}"

    def key(self) -> str:
        return digest([self.kind, self.block.key(), self.linears, self.part == 0])

    def lookup(self, workspace: Workspace) -> SolvedRecord | None:
        block = committed(workspace, COMPRESS, self.block.key(), BlockRecord)
        if block is None:
            return super().lookup(workspace)
        return SolvedRecord(
            blobs=block.stored, formats=block.formats, modules=block.modules, timing=block.timing, finished=True
        )

    def compute(self, context: TaskContext, workspace: Workspace) -> SolvedRecord:
        from counterweight.workers.divided_block import solved_part

        return solved_part(context, self.block, self.linears, workspace, keeps=self.part == 0, following=self.following)
