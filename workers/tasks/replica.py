"""A replica's part of a round of training."""

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


class ReplicaRecord(Record):
    """Where a replica stands behind its part. state: tensors of what steps change. loss: in nats a token, the sum over the
    part's sequences."""

    state: Blob
    loss: float
    timing: Timing

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        return (self.state,)


class Replica(Config, DurableTask[ReplicaRecord]):
    """Trains on one part of an epoch, from the mean of what the replicas of the round before have left."""

    kind: ClassVar[str] = "distill-replica"
    record: ClassVar[type[ReplicaRecord]] = ReplicaRecord

    training: TrainingSpec
    epoch: int
    """From 1."""
    round: int
    replica: int
    states: tuple[Blob, ...]
    """Of the replicas of the round before, in their order, or of the epoch before; none where training begins. They follow from
    the rest, so they are no part of the key."""

    def key(self) -> str:
        return digest([self.training.key(), self.epoch, self.round, self.replica])

    @property
    def name(self) -> str:
        options = self.training.options
        where = f", round {self.round + 1}, replica {self.replica + 1}" if options.replicas > 1 else ""
        return f"distillation, epoch {self.epoch}{where}"

    @property
    def patience(self) -> float:
        return self.training.patience

    @property
    def trains(self) -> str | None:
        return self.training.key()

    def workspace(self) -> Workspace:
        return self.training.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> ReplicaRecord:
        from counterweight.workers.distilled import train

        return train(context, self, workspace)
