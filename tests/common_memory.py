"""Workers of this process that pass hidden states on as those of `RayPool` do: a single one in its own memory, several through
memory that they have in common, in which shards are gone with the worker that has put them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from counterweight.pipeline.passing import CommonMemory, Given, Kept
from counterweight.workers.tasks.task import Task
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What `put` gives: a copy, and whose it is."""

    owner: Member
    tensor: Tensor


class Member:
    """A worker. shares: whether it is one of several."""

    def __init__(self, worker: Worker, *, shares: bool) -> None:
        self.worker, self.alive = worker, True
        self._memory: CommonMemory[Shard] | None = None
        if shares:
            self._memory = CommonMemory(lambda hidden: Shard(self, hidden.clone()), _get)
            worker.context.mailbox = self._memory

    def run(
        self, task: Task[Any], unread: Sequence[Blob], given: Given[Shard]
    ) -> tuple[Any, Mapping[str, Kept[Shard]]]:
        """As `WorkerActor.run_given`: the task's value, and what it has left in common memory."""
        if self._memory is None:
            return self.worker.run(task, unread), {}
        self._memory.begin(given)
        try:
            value = self.worker.run(task, unread)
        except BaseException:
            self._memory.end()
            raise
        return value, self._memory.end()

    def die(self) -> None:
        """What it has put into common memory is gone."""
        self.alive = False


def _get(shard: Shard) -> Tensor | None:
    assert shard.tensor._version == 0, "Ray's objects cannot be written to"
    return shard.tensor if shard.owner.alive else None
