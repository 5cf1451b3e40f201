"""A block's weights, read before there is anything to do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.tasks.block import BlockTask
from counterweight.workers.tasks.task import Task

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Prefetch(BlockTask, Task[None]):
    """Begins to read a block, on the worker that will calibrate it, where workers read ahead; nothing is waited for."""

    kind: ClassVar[str] = "prefetch"

    def run(self, context: TaskContext) -> None:
        from counterweight.workers.loaded_block import read_ahead

        read_ahead(context, self.block.setting, self.block.index, self.block.tensors)
