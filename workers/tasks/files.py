"""Files of an artifact: shards copied, factors and residual stores of all blocks joined into one, and bytes checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.storage import open_store, stream_sha256
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


@dataclass(frozen=True)
class Copy(Task[Written]):
    """Has the store copy a finished blob to the object `key`; its size and sha256. root: URI of the store that both lie in."""

    kind: ClassVar[str] = "copy"

    root: str
    blob: Blob
    key: str

    @property
    def name(self) -> str:
        return f"copy to {self.key}"

    @property
    def patience(self) -> float:
        return patience(bytes=2 * self.blob.size)

    def run(self, context: TaskContext) -> Written:
        open_store(self.root).copy(self.blob.key, self.key)
        return Written(size=self.blob.size, sha256=self.blob.sha256)


@dataclass(frozen=True)
class Join(Task[Written]):
    """Writes blobs of tensors as one file `path` below the root URI `output`; its size and sha256. workspace: root URI. parts:
    blob -> names of its tensors. what: for people."""

    kind: ClassVar[str] = "join"

    workspace: str
    parts: Sequence[tuple[Blob, Sequence[str]]]
    output: str
    path: str
    what: str

    @property
    def name(self) -> str:
        return self.what

    @property
    def patience(self) -> float:
        return patience(bytes=2 * sum(blob.size for blob, _ in self.parts))

    def run(self, context: TaskContext) -> Written:
        from counterweight.workers.join import join_tensors

        workspace, output = Workspace(open_store(self.workspace)), open_store(self.output)
        return join_tensors(workspace, self.parts, output, self.path, context.ahead)


@dataclass(frozen=True)
class Checksum(Task[str]):
    """sha256 of the bytes of the object `path` below the root URI `root`, in bounded memory. size: how many they should be."""

    kind: ClassVar[str] = "checksum"

    root: str
    path: str
    size: int = 0

    @property
    def patience(self) -> float:
        return patience(bytes=self.size)

    @property
    def name(self) -> str:
        return f"check of {self.path}"

    def run(self, context: TaskContext) -> str:
        return stream_sha256(open_store(self.root), self.path)
