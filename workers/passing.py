"""Hidden states from task to task: in memory where there is room, in the store where they have to outlast their worker.

Every shard is hashed once, when it is made: its blob is its name in memory and in the store. What is in memory alone is gone
with its worker; the graph of the job's tasks knows which shards these are and has them made again.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from counterweight.workers.errors import IntegrityError
from counterweight.workers.tensor_blobs import blob_of, get_tensors, put_tensors
from counterweight.workers.transfer import to_device, to_host
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext

NAME = "hidden"
"""Of the only tensor of a shard's blob."""


class Mailbox(Protocol):
    """Memory in which shards wait for the tasks that read them. Threads call it."""

    def keep(self, blob: Blob, hidden: Tensor, room: int) -> bool:
        """Takes a shard [sequences, length, hidden] of the host's memory, where all that this worker has made and that is kept
        is within `room` bytes then; whether it is kept."""
        ...

    def find(self, blob: Blob) -> Tensor | None:
        """A shard that is kept, not to be changed; None for any other."""
        ...

    def forget(self, blobs: Iterable[Blob]) -> None:
        """Nobody reads these any more."""
        ...


class OwnMemory:
    """A mailbox in the memory of this process."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, int]] = {}
        """sha256 -> the shard, and its version: torch counts changes."""
        self._lock = Lock()
        self.bytes = 0

    def keep(self, blob: Blob, hidden: Tensor, room: int) -> bool:
        """See `Mailbox`."""
        # Pinned memory comes in powers of two: a copy takes what its bytes say.
        own = hidden.clone() if hidden.is_pinned() else hidden
        with self._lock:
            if blob.sha256 in self._kept:
                return True
            if self.bytes + hidden.nbytes > room:
                return False
            self._kept[blob.sha256] = own, own._version
            self.bytes += hidden.nbytes
            return True

    def find(self, blob: Blob) -> Tensor | None:
        """See `Mailbox`. IntegrityError where somebody has changed it."""
        with self._lock:
            hidden, version = self._kept.get(blob.sha256, (None, 0))
        if hidden is not None and hidden._version != version:
            raise IntegrityError(f"hidden states {blob.sha256}: were changed in memory")
        return hidden

    def forget(self, blobs: Iterable[Blob]) -> None:
        """See `Mailbox`."""
        with self._lock:
            for blob in blobs:
                hidden, _ = self._kept.pop(blob.sha256, (None, 0))
                self.bytes -= 0 if hidden is None else hidden.nbytes


def pass_on(context: TaskContext, workspace: Workspace, hidden: Tensor, *, room: int, lasting: bool) -> Blob:
    """Names a shard of hidden states [sequences, length, hidden] by its bytes and leaves it for the tasks that read it.

    room: bytes of shards that a worker keeps in memory. lasting: whether it is written to the store too; it is anyhow where
    memory has no room for it.
    """
    # Contiguous, as it comes back from the store: products can depend on how a matrix lies in memory.
    own = to_host(hidden.detach()).contiguous()
    blob = blob_of({NAME: own})
    kept = room > 0 and context.mailbox.keep(blob, own, room)
    if lasting or not kept:
        put_tensors(workspace, {NAME: own}, durable=False, blob=blob)
    return blob


def receive(context: TaskContext, workspace: Workspace, blob: Blob) -> Tensor:
    """A shard of hidden states [sequences, length, hidden] on the worker's device, not to be changed; from the store every byte
    is verified. ObjectNotFoundError where it is gone."""
    found = context.mailbox.find(blob)
    return to_device(get_tensors(workspace, blob)[NAME] if found is None else found, context.device)


def waits(context: TaskContext, workspace: Workspace, blob: Blob) -> bool:
    """Whether a shard of hidden states is there, in memory or in the store."""
    return context.mailbox.find(blob) is not None or workspace.has(blob)
