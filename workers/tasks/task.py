"""A unit of work, and the one place where finished work is looked up and new work is committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext

R = TypeVar("R")
Kept = TypeVar("Kept", bound=Record)


class Task(ABC, Generic[R]):
    """What one worker does at a time. R: what it gives back."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """For people, and what tries are counted by: no two tasks of a job have the same."""

    @abstractmethod
    def run(self, context: TaskContext) -> R:
        """Does the work on a worker. Nothing that comes from the context alone may decide the result."""


class DurableTask(Task[Kept]):
    """A task whose result is kept: written once, whole, under the digest of everything that determines it."""

    record: ClassVar[type[Record]]

    @abstractmethod
    def key(self) -> str:
        """The digest; a result of the same key is the result."""

    @abstractmethod
    def workspace(self) -> Workspace:
        """Where results are kept."""

    def blobs(self, record: Kept) -> Iterable[Blob]:
        """What has to be there for a record to count; without it the work is done again."""
        del record
        return ()

    @abstractmethod
    def compute(self, context: TaskContext, workspace: Workspace) -> Kept:
        """The work itself."""

    def run(self, context: TaskContext) -> Kept:
        """1. Somebody may have finished it. 2. Otherwise it is done here. 3. The record that was committed first holds."""
        workspace, key = self.workspace(), self.key()
        done: Kept | None = workspace.lookup(self.kind, key, self.record)  # type: ignore[assignment]
        if done is not None and all(workspace.has(blob) for blob in self.blobs(done)):
            return done
        return workspace.commit(self.kind, key, self.compute(context, workspace))
