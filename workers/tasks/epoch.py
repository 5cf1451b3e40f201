"""The end of an epoch of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.keys import digest
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.tasks.training import TrainingSpec
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class EpochRecord(Record):
    """A training behind an epoch; see `workers.distillation.training.State`."""

    state: Blob
    best: int
    divergences: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    timing: Timing = Timing()

    @property
    def epoch(self) -> int:
        return len(self.losses)

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        return (self.state,)


class Epoch(Config, DurableTask[EpochRecord]):
    """Averages the replicas behind an epoch's last round, measures the held-out texts, and finds out which epoch is kept."""

    kind: ClassVar[str] = "distill-epoch"
    record: ClassVar[type[EpochRecord]] = EpochRecord

    training: TrainingSpec
    before: EpochRecord | None
    """None for the first epoch."""
    states: tuple[Blob, ...]
    """Of the replicas, in their order. They, the epoch before and the loss follow from the training and the epoch."""
    loss: float
    """The sum over all sequences of the epoch."""

    @property
    def epoch(self) -> int:
        """From 1."""
        return 1 if self.before is None else self.before.epoch + 1

    def key(self) -> str:
        return epoch_key(self.training, self.epoch)

    @property
    def name(self) -> str:
        return f"end of distillation's epoch {self.epoch}"

    @property
    def patience(self) -> float:
        return self.training.patience

    @property
    def trains(self) -> str | None:
        return self.training.key()

    def workspace(self) -> Workspace:
        return self.training.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> EpochRecord:
        from counterweight.workers.distilled import close

        return close(context, self, workspace)


def epoch_key(training: TrainingSpec, epoch: int) -> str:
    """Key of the record behind an epoch, from 1."""
    return digest([training.key(), epoch])
