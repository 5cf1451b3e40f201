"""A pool of workers that do nothing but let a simulated clock run: what the real dispatcher and the real graph are timed with.

So that an estimate cannot drift from what is run, tasks of blocks are those that a job would start, in the order and on the
workers that the dispatcher chooses. Only their work is replaced by its seconds.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from counterweight.pipeline.estimate.costs import BlockSeconds
from counterweight.pipeline.estimate.sharing import SharedSeconds, Steps
from counterweight.pipeline.pool import Outcome
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.tasks.block import BlockRecord, BlockTask
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.gains import Gains, GainsRecord
from counterweight.workers.tasks.prefetch import Prefetch
from counterweight.workers.tasks.propagate import Propagate, PropagatedRecord
from counterweight.workers.tasks.records import HiddenRecord, Timing
from counterweight.workers.tasks.solve import Solve, SolvedRecord
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import Blob

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext

SHARD = Blob(sha256="0" * 64, size=0)
"""Any shard of hidden states."""

NO_TIME = Timing()


@dataclass(frozen=True)
class Simulated(Task[HiddenRecord]):
    """A task that is nothing but its seconds. shards: of hidden states that it makes."""

    kind: ClassVar[str] = "simulated"

    label: str
    steps: Steps
    shards: int = 0

    @property
    def name(self) -> str:
        return self.label

    @property
    def patience(self) -> float:
        return sum(self.steps.values())

    def run(self, context: TaskContext) -> HiddenRecord:
        raise NotImplementedError("a simulated task is for a simulated pool")


class SimulatedPool:
    """Workers on one clock. clock: seconds since the job began. steps: what they worked on, in seconds, over all workers.

    blocks: seconds of each block's tasks. bytes: that a block leaves in a worker's memory until a budget is shared out, as the
    graph counts them; 0 without a budget. ahead: whether workers read a block's weights while they solve another one. shared:
    of each block's tasks where workers share it.
    """

    def __init__(
        self,
        size: int,
        threads: int,
        blocks: Sequence[BlockSeconds],
        between: float,
        bytes: Sequence[int],
        *,
        ahead: bool = False,
        shared: Sequence[SharedSeconds] = (),
    ) -> None:
        self.size, self.threads = size, threads
        self.room: int | None = 0
        self.clock = 0.0
        self.steps: Counter[str] = Counter()
        self._blocks, self._between, self._bytes = blocks, between, bytes
        self._pending: list[tuple[float, int, int, object]] = []
        self._tickets = 0
        self._idle = list(range(size))
        self._held: list[dict[tuple[int, bool], int]] = [{} for _ in range(size)]
        """Of each worker: block, and whether it is only passed -> shards that its sums are over."""
        self._shared = shared
        self._prepared: list[tuple[int, bool] | None] = [None] * size
        """Of each worker: the block of which it has solved a part, and whether all that others solved is in its place."""
        self._reads_ahead = ahead
        self._ahead: dict[int, tuple[int, float]] = {}
        """Worker -> the block whose weights it reads ahead, and when it began to."""

    def idle(self) -> list[int]:
        return list(self._idle)

    def submit(self, worker: int, task: Task[object]) -> int:
        self._idle.remove(worker)
        steps, value = self._done(worker, task)
        self.steps.update(steps)
        self._tickets += 1
        end = self.clock + sum(steps.values()) + self._between
        heapq.heappush(self._pending, (end, self._tickets, worker, value))
        return self._tickets

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._pending:
            return []
        self.clock, ticket, worker, value = heapq.heappop(self._pending)
        self._idle.append(worker)
        return [Outcome(ticket, worker, value=value)]

    def forget(self, unread: Sequence[Blob]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing runs."""

    def _done(self, worker: int, task: Task[object]) -> tuple[Steps, object]:
        """Seconds of a task, step by step, and what it gives back."""
        if isinstance(task, Simulated):
            return task.steps, HiddenRecord.model_construct(outputs=(SHARD,) * task.shards, timing=NO_TIME)
        if isinstance(task, Prefetch):
            if self._ahead.get(worker, (None,))[0] != task.block.index:
                self._ahead[worker] = (task.block.index, self.clock)
            return {}, None
        if isinstance(task, Calibrate):
            steps = self._calibrated(worker, task, task.start, task.stop)
            outputs = (SHARD,) * (task.stop - task.start)
            return steps, HiddenRecord.model_construct(outputs=outputs, timing=NO_TIME)
        if isinstance(task, Gains):
            whole = len(task.block.inputs)
            return self._calibrated(worker, task, whole, whole), GainsRecord.model_construct(gains={}, outputs=())
        if isinstance(task, Solve):
            return self._solved(worker, task), SolvedRecord.model_construct(blobs=(), timing=NO_TIME, finished=True)
        if isinstance(task, Propagate):
            behind = (SHARD,) * (task.stop - task.start)
            originals = behind if task.block.original_inputs else ()
            return self._propagated(worker, task), PropagatedRecord.model_construct(
                outputs=behind, original_outputs=originals, timing=NO_TIME
            )
        if isinstance(task, Compress) and task.solved:
            record = BlockRecord.model_construct(index=task.block.index, outputs=(), original_outputs=())
            return self._shared[task.block.index].compress(), record
        if isinstance(task, Compress):
            block = task.block
            whole = len(block.inputs)
            steps = self._calibrated(worker, task, whole, whole)
            if task.following is not None and self._reads_ahead:
                self._ahead[worker] = (task.following.index, self.clock + sum(steps.values()))
            steps |= self._blocks[block.index].ending()
            self._held[worker].pop((block.index, False), None)
            outputs = block.inputs if block.propagate == "compressed" else ()
            return steps, BlockRecord.model_construct(
                index=block.index, outputs=outputs, original_outputs=block.original_inputs
            )
        raise TypeError(f"{task.name}: expected a task of a block or a simulated one")

    def _calibrated(self, worker: int, task: BlockTask, start: int, stop: int) -> dict[str, float]:
        """What a worker has to do until it holds a block's sums over its first `stop` shards. start: where they should be."""
        index, held = task.block.index, self._held[worker]
        passing = isinstance(task, Calibrate) and task.passing
        block, seen = self._blocks[index], held.pop((index, passing), None)
        steps: dict[str, float] = {}
        if seen is None or seen != start:
            seen = 0
            steps = self._begun(worker, index)
        held[index, passing] = stop
        steps.update(block.streamed(stop - seen, passing=passing))
        return steps

    def _begun(self, worker: int, index: int) -> dict[str, float]:
        """Steps of a block before its first shard."""
        self._make_room(self._held[worker])
        self._prepared[worker] = None
        steps = dict(self._blocks[index].beginning())
        ahead, begun = self._ahead.pop(worker, (None, 0.0))
        if ahead == index:
            steps["read"] = max(0.0, steps["read"] - (self.clock - begun))
        return steps

    def _solved(self, worker: int, task: Solve) -> Steps:
        """A part of a block's linears, on shards that the worker runs the block over for them alone."""
        index = task.block.index
        steps = {**self._begun(worker, index), **self._shared[index].solve(task.linears)}
        self._prepared[worker] = (index, False)
        if task.following is not None and self._reads_ahead:
            solving = steps["solve"] + steps["write"]
            self._ahead[worker] = (task.following.index, self.clock + sum(steps.values()) - solving)
        return steps

    def _propagated(self, worker: int, task: Propagate) -> Steps:
        """A stretch of shards, on a worker that may have the block in memory."""
        index, shared = task.block.index, self._shared[task.block.index]
        steps = Counter(shared.propagate(task.stop - task.start))
        if self._prepared[worker] not in ((index, False), (index, True)):
            steps.update(self._begun(worker, index))
        if self._prepared[worker] != (index, True):
            steps.update(shared.install())
        self._prepared[worker] = (index, True)
        return steps

    def _make_room(self, held: dict[tuple[int, bool], int]) -> None:
        """As `HeldBlocks` does before a further block is calibrated."""
        for index, passing in list(held):
            if not self._bytes[index] or sum(self._bytes[other] for other, _ in held) > HOLD_BYTES:
                del held[index, passing]
