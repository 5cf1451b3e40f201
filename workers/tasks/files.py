"""Files of an artifact: shards copied, factors and residual stores of all blocks joined into one, and bytes checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.errors import CheckpointError
from counterweight.workers.storage import open_store, stream_sha256
from counterweight.workers.storage.base import Written
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext
    from counterweight.workers.join import Awaited, Part


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
class Join(Task[Written | None]):
    """Writes blobs of tensors as one file `path` below the root URI `output`; its size and sha256, None where there are no
    blobs. workspace: root URI. parts: blobs, and their tensors with digests. awaited: see `join_tensors`; the worker then holds
    what it has written of the file. what: for people."""

    kind: ClassVar[str] = "join"

    workspace: str
    parts: Sequence[Part]
    output: str
    path: str
    what: str
    awaited: Sequence[Awaited] = ()

    @property
    def name(self) -> str:
        return f"{self.what}, without {len(self.awaited)} blocks" if self.awaited else self.what

    @property
    def patience(self) -> float:
        return patience(bytes=2 * sum(blob.size for blob, _ in self.parts))

    def run(self, context: TaskContext) -> Written | None:
        from counterweight.workers.join import join_tensors

        if not self.parts:
            return None
        workspace, output = Workspace(open_store(self.workspace)), open_store(self.output)
        return join_tensors(workspace, self.parts, output, self.path, context.ahead, context.begun, self.awaited)


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


@dataclass(frozen=True)
class CheckTensors(Task[bool]):
    """Whether these tensors of a safetensors file that we have written are what they should be, and its header is: one of
    several workers that read a large file. key: of the object below the root URI `root`. tensors: name -> digest
    (`checkpoint.digest`), of `count` in all. bytes: of these, about; part: of which blocks they are, for people."""

    kind: ClassVar[str] = "checksum"

    root: str
    path: str
    tensors: Mapping[str, str]
    count: int
    bytes: int
    part: str

    @property
    def patience(self) -> float:
        return patience(bytes=self.bytes)

    @property
    def name(self) -> str:
        return f"check of {self.path}, blocks {self.part}"

    def run(self, context: TaskContext) -> bool:
        from counterweight.workers.checkpoint.reader import Checkpoint
        from counterweight.workers.checkpoint.writer import header_bytes

        store = open_store(self.root)
        try:
            file = Checkpoint.of_file(store, self.path)
            if len(file.names) != self.count or not self.tensors.keys() <= set(file.names):
                return False
            expected = header_bytes({name: (file.entry(name).dtype, file.entry(name).shape) for name in file.names})
            found = file.inspect(self.tensors)
        except CheckpointError:
            return False
        header = store.read_range(self.path, 0, len(expected)) if store.size(self.path) >= len(expected) else b""
        return header == expected and {name: one.sha256 for name, one in found.items()} == dict(self.tensors)
