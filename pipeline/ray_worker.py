"""A worker as an actor of Ray: with several of them, hidden states pass through Ray's object stores.

A node's object store is memory that all of its workers read without a copy; a shard that lies on another node is fetched into
the reader's. Ray deletes an object when nobody refers to it any more, and loses it with the process that has put it there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from counterweight.pipeline.passing import CommonMemory, Given, Kept
from counterweight.workers.process import Done, WorkerProcess

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray
    from ray import ObjectRef
    from torch import Tensor

    from counterweight.workers.tasks.setting import Device
    from counterweight.workers.tasks.task import Task
    from counterweight.workers.workspace import Blob

    Shard: TypeAlias = tuple[NDArray[numpy.uint8], torch.dtype, torch.Size]
    """Bytes, dtype and shape: numpy has no bfloat16."""
    Reference: TypeAlias = "ObjectRef[Shard]"

R = TypeVar("R")

FETCH_SECONDS = 60.0
"""That fetching a shard from another node may take: one of 64 MiB takes less than a second, and of a node that is frozen none
comes. It is read from the store then, or made again."""


class WorkerActor(WorkerProcess):
    """shares: whether hidden states are left where other workers find them too, and not in this process."""

    def __init__(self, device: Device, threads: int, shares: bool) -> None:
        super().__init__(device, threads)
        self._memory: CommonMemory[Reference] | None = None
        if shares:
            # Nobody writes to hidden states, which is what torch warns of.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._memory = CommonMemory(put, get)
            self._worker.context.mailbox = self._memory

    def run_given(
        self, task: Task[R], unread: Sequence[Blob], given: Given[Reference]
    ) -> tuple[Done[R], Mapping[str, Kept[Reference]]]:
        """What the task gives back, and which shards it has left in the object store. unread: see `run`. given: what it may
        read there."""
        if self._memory is None:
            return self.run(task, unread), {}
        self._memory.begin(given)
        try:
            done = self.run(task, unread)
        except BaseException:
            self._memory.end()  # what it has made so far is free
            raise
        return done, self._memory.end()


def put(hidden: Tensor) -> Reference | None:
    """Copies a tensor of the host into the node's object store; None where that is full and its disk too."""
    import ray
    import torch

    shard: Shard = (hidden.view(-1).view(torch.uint8).numpy(), hidden.dtype, hidden.shape)
    try:
        reference: Reference = ray.put(shard)
        return reference
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError):
        return None


def get(reference: Reference) -> Tensor | None:
    """The tensor, on memory that cannot be written to; None where it is gone or does not come."""
    import ray
    import torch

    try:
        data, dtype, shape = ray.get(reference, timeout=FETCH_SECONDS)
    except ray.exceptions.RayError:
        return None
    return torch.from_numpy(data).view(dtype).view(shape)
