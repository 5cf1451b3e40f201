"""The first look at source tensors: a digest of each, and whether it is finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.checkpoint.inspector import TensorDigest
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.task import Task

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


@dataclass(frozen=True)
class Inspect(Task[dict[str, TensorDigest]]):
    """Reads each byte of these tensors once, in bounded memory. source: root URI. part: of how many, for people. bytes: of
    all."""

    kind: ClassVar[str] = "inspect"

    source: str
    names: Sequence[str]
    part: str = "1 of 1"
    bytes: int = 0

    @property
    def name(self) -> str:
        return f"inventory {self.part}"

    @property
    def patience(self) -> float:
        return patience(bytes=self.bytes)

    def run(self, context: TaskContext) -> dict[str, TensorDigest]:
        from counterweight.workers.checkpoint.reader import Checkpoint

        return Checkpoint.open(open_store(self.source)).inspect(self.names)
