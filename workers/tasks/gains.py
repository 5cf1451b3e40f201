"""What branches could win in a block, for a budget that the whole model shares out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Calibrates a block and measures the gains on its statistics, where they are."""

    kind: ClassVar[str] = GAINS
    record: ClassVar[type[GainsRecord]] = GainsRecord

    def key(self) -> str:
        return self.block.key()

    def blobs(self, record: GainsRecord) -> Iterable[Blob]:
        return record.outputs

    def compute(self, context: TaskContext, workspace: Workspace) -> GainsRecord:
        from counterweight.workers.calibrated_block import branch_gains

        gains, outputs = branch_gains(context, self.block, workspace)
        return GainsRecord(gains=gains, outputs=outputs)
