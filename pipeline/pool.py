"""What a pool of workers is: who is idle, what was given to whom, what came back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from counterweight.workers.storage.traffic import NONE, Traffic

if TYPE_CHECKING:
    from counterweight.workers.identity import WorkerReport
    from counterweight.workers.tasks.setting import Device
    from counterweight.workers.tasks.task import Task
    from counterweight.workers.workspace import Blob


START_SECONDS = float(os.environ.get("COUNTERWEIGHT_START_SECONDS", "300"))
"""How long a job goes on without any worker: a loaded machine takes as long to import torch, a cluster to add a node."""


STARTS = 3
"""Processes in a row that may die before their first answer, until a worker is given up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A call that is over: its value, or the error. worker_died: what the worker held in memory is gone. traffic: of the
    worker with stores while it had the call, where it has a process of its own."""

    ticket: int
    worker: int
    value: object = None
    error: BaseException | None = None
    worker_died: bool = False
    traffic: Traffic = NONE


class WorkerPool(Protocol):
    """What the orchestrator needs of a pool. Workers that die are replaced by the pool itself; they are idle again when they
    have answered."""

    size: int
    """Workers that were asked for; fewer may be there."""
    threads: int
    """Of each worker, that share the shards of a task."""
    room: int | None
    """Bytes of hidden states that a worker can leave in memory for the tasks that read them, on whichever worker, as long as
    nobody dies; 0: none; None: as many as its memory has."""

    def idle(self) -> Sequence[int]:
        """Workers that have answered and have no task, longest idle first."""

    def submit(self, worker: int, task: Task[object]) -> int:
        """Starts a task on an idle worker; returns a ticket."""

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes that arrived, waiting at most `seconds` for the first; and of workers that died without a task, with ticket
        0. WorkerError when nobody can be waited for."""

    def forget(self, unread: Sequence[Blob]) -> None:
        """Hidden states that no task reads any more: their memory is free when the next task begins."""

    def close(self) -> None:
        """Ends the workers."""


class StartedPool(WorkerPool, Protocol):
    """A pool of processes, which say who they are."""

    def first(self) -> WorkerReport:
        """Who the first worker is that answers; WorkerError when none does in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """workers: how many. cpus: of each, also its threads. gpus: of each; fractions share a GPU."""

    workers: int
    cpus: int
    gpus: float

    @property
    def device(self) -> Device:
        """The kind of device that the manifest asks for."""
        return "cuda" if self.gpus > 0 else "cpu"


def threads_per_worker(cpus: int | None, workers: int, *, available: Sequence[int]) -> int:
    """CPUs of each worker: as the manifest says, otherwise an equal share of this machine's."""
    return cpus if cpus is not None else max(1, len(available) // workers)
