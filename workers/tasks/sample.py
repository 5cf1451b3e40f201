"""Calibration tokens that the model writes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.dtypes import ComputeDtype
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.setting import Device
from counterweight.workers.tasks.task import Task

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Sample(Config, Task[list[list[int]]]):
    """Windows of tokens that a model draws from its own distribution; it is in memory as a whole."""

    kind: ClassVar[str] = "sample"

    source: str
    """Root URI of its checkpoint."""
    compute_dtype: ComputeDtype
    sequences: int
    length: int
    temperature: float
    seed: int
    parameters: int = 0
    """Of the model, and where it computes: for `Task.patience`, no part of the result."""
    device: Device = "cpu"

    @property
    def name(self) -> str:
        return "tokens of the model's own"

    @property
    def patience(self) -> float:
        # A token at a time: each reads all weights again.
        flops = 2 * self.parameters * self.sequences * self.length
        return patience(bytes=4 * self.parameters, flops=flops, device=self.device)

    def run(self, context: TaskContext) -> list[list[int]]:
        from counterweight.workers.calibration.sampling import sample
        from counterweight.workers.checkpoint.reader import Checkpoint
        from counterweight.workers.context import DTYPES
        from counterweight.workers.memory import release
        from counterweight.workers.models.block_builder import BlockBuilder
        from counterweight.workers.models.source import whole
        from counterweight.workers.storage import open_store

        checkpoint = Checkpoint.open(open_store(self.source))
        builder = BlockBuilder(checkpoint.config, frozenset(checkpoint.names))
        model = whole(checkpoint, builder, context.device, DTYPES[self.compute_dtype])
        ids = sample(model, self.sequences, self.length, temperature=self.temperature, seed=self.seed)
        del model
        release(context.device)
        rows: list[list[int]] = ids.tolist()
        return rows
