"""Hidden states from worker to worker through memory that all of them reach: what lies where, and what each task is given.

A worker puts a shard into that memory and gives a reference back with its task's result. The driver has the only list of
references: it hands them to the tasks that read these shards, and what nobody reads any more is free when it drops them. A
shard is gone with the worker that has put it there. Knows no Ray: what a reference is, say `put` and `get`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from counterweight.workers.tasks.task import Task
    from counterweight.workers.workspace import Blob

Ref = TypeVar("Ref")


@dataclass(frozen=True, slots=True)
class Kept(Generic[Ref]):
    """A shard in the common memory, of so many bytes."""

    reference: Ref
    bytes: int


@dataclass(frozen=True, slots=True)
class Given(Generic[Ref]):
    """What a task is told of the common memory. shards: sha256 -> reference, of what it may read. taken: bytes of all that its
    worker has put there and that are not free yet."""

    shards: Mapping[str, Ref] = field(default_factory=dict)
    taken: int = 0


class References(Generic[Ref]):
    """The driver's list: which shards are in the common memory, and who has put them there."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, Kept[Ref]]] = {}
        """sha256 -> the worker that has put it there last, and where."""

    def given(self, worker: int, task: Task[object]) -> Given[Ref]:
        """What a worker is told with a task."""
        shards = {blob.sha256: self._kept[blob.sha256][1].reference for blob in task.reads if blob.sha256 in self._kept}
        return Given(shards, sum(kept.bytes for owner, kept in self._kept.values() if owner == worker))

    def add(self, worker: int, made: Mapping[str, Kept[Ref]]) -> None:
        """What a worker has put there: sha256 -> where."""
        self._kept |= {sha256: (worker, kept) for sha256, kept in made.items()}

    def forget(self, blobs: Iterable[Blob]) -> None:
        """Nobody reads these any more."""
        for blob in blobs:
            self._kept.pop(blob.sha256, None)

    def lost(self, worker: int) -> None:
        """Its process is gone, or answers no more."""
        self._kept = {sha256: own for sha256, own in self._kept.items() if own[0] != worker}


class CommonMemory(Generic[Ref]):
    """A worker's mailbox (`workers.passing.Mailbox`), for one task at a time.

    put: copies a shard [sequences, length, hidden] of the host into the common memory; None where that has no room. get: a
    shard, not to be changed; None where it is gone.
    """

    def __init__(self, put: Callable[[Tensor], Ref | None], get: Callable[[Ref], Tensor | None]) -> None:
        self._put, self._get = put, get
        self._given: Given[Ref] = Given()
        self._made: dict[str, Kept[Ref]] = {}
        self._taken = 0
        self._lock = Lock()

    def begin(self, given: Given[Ref]) -> None:
        """A task begins. given: what the driver says of the shards that it reads."""
        self._given, self._made, self._taken = given, {}, given.taken

    def end(self) -> Mapping[str, Kept[Ref]]:
        """What the task has made, which is the driver's from now on: sha256 -> where."""
        made = self._made
        self.begin(Given())
        return made

    def keep(self, blob: Blob, hidden: Tensor, room: int) -> bool:
        """See `Mailbox`; takes a copy."""
        with self._lock:
            if blob.sha256 in self._made:
                return True
            if self._taken + hidden.nbytes > room:
                return False
            self._taken += hidden.nbytes
        reference = self._put(hidden)
        with self._lock:
            if reference is None:
                self._taken -= hidden.nbytes
                return False
            self._made[blob.sha256] = Kept(reference, hidden.nbytes)
            return True

    def find(self, blob: Blob) -> Tensor | None:
        """See `Mailbox`."""
        if (made := self._made.get(blob.sha256)) is not None:
            return self._get(made.reference)
        reference = self._given.shards.get(blob.sha256)
        return None if reference is None else self._get(reference)

    def forget(self, blobs: Iterable[Blob]) -> None:
        """The driver's list says what is kept."""
