"""A unit of work, and the one place where finished work is looked up and new work is committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext

R_co = TypeVar("R_co", covariant=True)
Kept = TypeVar("Kept", bound=Record)


def committed(workspace: Workspace, kind: str, key: str, record: type[Kept]) -> Kept | None:
    """The record of finished work whose stored bytes are there; None where there is none."""
    found = workspace.lookup(kind, key, record)
    return found if found is not None and all(workspace.has(blob) for blob in found.stored) else None


class Task(ABC, Generic[R_co]):
    """What one worker does at a time. R_co: what it gives back."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """For people, and what tries are counted by: no two tasks of a job have the same."""

    @property
    def block_index(self) -> int | None:
        """The transformer block that the task works on, for people; None: none or several."""
        return None

    @property
    @abstractmethod
    def patience(self) -> float:
        """Seconds after which it is taken to hang, from what it reads, writes and computes: see `workers.tasks.patience`."""

    @property
    def reads(self) -> tuple[Blob, ...]:
        """Hidden states that it may read, where they may be in memory."""
        return ()

    @property
    def trains(self) -> str | None:
        """Key of the training whose model it works on, which then stays in its worker's memory; None: none."""
        return None

    def lookup(self, workspace: Workspace) -> R_co | None:
        """The result, where somebody has finished the task before and its stored bytes are there; None otherwise. Hidden
        states that can be made again need not be there."""
        del workspace
        return None

    @abstractmethod
    def run(self, context: TaskContext) -> R_co:
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

    @abstractmethod
    def compute(self, context: TaskContext, workspace: Workspace) -> Kept:
        """The work itself."""

    def lookup(self, workspace: Workspace) -> Kept | None:
        return committed(workspace, self.kind, self.key(), self.record)  # type: ignore[return-value]

    def run(self, context: TaskContext) -> Kept:
        """1. Somebody may have finished it. 2. Otherwise it is done here. 3. The record that was committed first holds."""
        workspace = self.workspace()
        from counterweight.workers.passing import waits

        done = self.lookup(workspace)
        if done is not None and all(waits(context, workspace, blob) for blob in done.hidden_states):
            return done
        return workspace.commit(self.kind, self.key(), self.compute(context, workspace))
