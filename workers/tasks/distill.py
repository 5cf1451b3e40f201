"""A compressed model, trained as a whole behind the closed forms, as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.tasks.epoch import EpochRecord
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.tasks.training import TrainingSpec
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class TrainedBlock(Config):
    """A compressed block after training, as `BlockRecord` has it."""

    checkpoint: Blob
    adapter: Blob | None
    tensors: Mapping[str, str]
    factors: Mapping[str, str]


class DistillRecord(Record):
    """What training made of the model.

    kept: the epoch that is stored; 0: training won nothing, the blocks stay as they were. divergences: for each
    epoch from 0, before training, KL(original || compressed) of each held-out text in nats a token. losses: for each epoch from
    1, that of the training texts, in the mean over its steps. blocks: by index; empty when `kept` is 0. states: what the last
    epoch has left; of no use once the model is published.
    """

    kept: int
    divergences: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    blocks: Mapping[int, TrainedBlock]
    states: tuple[Blob, ...]
    timing: Timing

    @property
    def stored(self) -> tuple[Blob, ...]:
        blobs = [blob for block in self.blocks.values() for blob in (block.checkpoint, block.adapter)]
        return tuple(blob for blob in blobs if blob is not None)


class Distill(Config, DurableTask[DistillRecord]):
    """Stores the blocks as the epoch that is kept left them."""

    kind: ClassVar[str] = "distill"
    record: ClassVar[type[DistillRecord]] = DistillRecord

    training: TrainingSpec
    last: EpochRecord
    """Of the epoch that training ended with, which follows from the rest."""

    def key(self) -> str:
        return self.training.key()

    @property
    def name(self) -> str:
        return "distillation"

    @property
    def patience(self) -> float:
        return self.training.patience

    @property
    def trains(self) -> str | None:
        return self.training.key()

    def workspace(self) -> Workspace:
        return self.training.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> DistillRecord:
        from counterweight.workers.distilled import store

        return store(context, self, workspace)
