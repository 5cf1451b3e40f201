"""How a job's hidden states get from block to block: what is kept in memory, what is written, what a death costs.

A single worker keeps them in its own memory, several in Ray's object store (`pipeline.passing`). Either way each has room for
what enters and what leaves a block: what it has made is kept until the block behind is compressed, and meanwhile it may begin
with its next block.
"""

from __future__ import annotations

from collections.abc import Callable

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.units import bytes_text, seconds_text
from counterweight.workers.config import Config

GPU_EVERY = 8
"""Blocks between two boundaries that are written, with GPUs, unless the manifest says otherwise. A GPU runs a block over its
shards in the time that storage takes to write them, so that writing costs as much as running a block again: seven are run again
at worst, and seven of eight boundaries are not written."""

CPU_LOSS = 60.0
"""Seconds of work that a death may cost a single worker on CPUs, unless the manifest says otherwise. A block of a large model
takes longer, and writing what leaves it is little beside that; of a small one it is a twentieth of the block's seconds. Several
workers write every boundary: what one has made others have begun to work on."""

GPU_ROOM = 24 << 30
"""Memory of the host for them, for a worker with a GPU, unless the manifest says otherwise: what enters and what leaves a block
of Llama-3-8B is 16 GiB on 512 x 2048 tokens in bfloat16."""


class HiddenStatesPlan(Config):
    """boundary_bytes: of what passes from one block to the next. memory_bytes: of these that each worker keeps in memory, 0:
    none.
    durable_every: blocks between two boundaries that are written to the store, 0: none is, so far as memory has room."""

    boundary_bytes: int
    memory_bytes: int
    durable_every: int
    blocks: int
    lost_seconds: float | None = None
    """Of work that is done again at worst when a worker or the job dies; null where nothing is known of the device."""

    @property
    def kept(self) -> float:
        """Share of the shards that is read from memory: what enters a block and what leaves it are there at a time."""
        return min(1.0, self.memory_bytes / max(1, 2 * self.boundary_bytes))

    def lasting(self, block: int) -> bool:
        """Whether what leaves a block is written."""
        return not self.memory_bytes or (bool(self.durable_every) and (block + 1) % self.durable_every == 0)

    def written(self, block: int) -> float:
        """Share of what leaves a block that is written: all, or what memory has no room for."""
        return 1.0 if self.lasting(block) else 1.0 - self.kept

    def sparing(self, lost: Callable[[int], float]) -> HiddenStatesPlan:
        """The same with as few boundaries written as `CPU_LOSS` allows. lost: seconds of a death that costs so many blocks
        beside the one under way."""
        every = next((count for count in range(self.blocks, 1, -1) if lost(count - 1) <= CPU_LOSS), 1)
        return self.model_copy(update={"durable_every": every if every < self.blocks else 0})

    @property
    def read_bytes(self) -> int:
        """From the store, by all blocks."""
        return round(self.blocks * self.boundary_bytes * (1.0 - self.kept))

    @property
    def written_bytes(self) -> int:
        """To the store, by the embedding and all blocks."""
        return round(self.boundary_bytes * (1.0 + sum(map(self.written, range(self.blocks)))))

    @property
    def lost_blocks(self) -> int:
        """Blocks, at worst, that are run again after a death, beside the one that was under way."""
        return 0 if not self.memory_bytes else min(self.durable_every or self.blocks, self.blocks) - 1

    def text(self) -> str:
        """For people."""
        boundary = f"{bytes_text(self.boundary_bytes)} behind each block"
        if not self.memory_bytes:
            return f"{boundary}, through the store"
        every = self.durable_every
        grain = {0: "none is written", 1: "each is written"}.get(every, f"one of {every} is written")
        again = f"{self.lost_blocks} blocks and the one under way" if self.lost_blocks else "the block under way"
        seconds = "" if self.lost_seconds is None else f", {seconds_text(self.lost_seconds)}"
        return (
            f"{boundary}, in {bytes_text(self.memory_bytes)} of memory; {grain}, {bytes_text(self.written_bytes)} in all; "
            f"a death costs {again} at worst{seconds}"
        )


def reserved(job: CompressionJob, boundary: int) -> int:
    """Memory that the manifest sets apart, as far as it can be used: it is not there for tasks."""
    resources = job.spec.resources
    return min(2 * boundary, resources.hidden_states.memory_bytes or 0)


NODE_GPUS = 8
"""Of a machine with several, as they are sold."""


def away(job: CompressionJob) -> float | None:
    """Share of what workers pass on in memory that lies on another node than its reader; None of one worker, in whose own
    memory it is. Workers without GPUs are taken to share one node."""
    workers = job.spec.resources.workers
    return None if workers == 1 else 1.0 - on_a_node(job, workers) / workers


def on_a_node(job: CompressionJob, workers: int) -> int:
    """How many of the job's workers, who are so many, are on one node."""
    each = job.spec.resources.gpus_per_worker
    return max(1, min(workers, int(NODE_GPUS / each) if each else workers))


def hidden_states(job: CompressionJob, boundary: int, blocks: int, free: int | None) -> HiddenStatesPlan:
    """Of so many blocks. boundary: bytes behind each. free: bytes that a worker's host has for it beside its tasks; None: not
    known."""
    asked, gpu = job.spec.resources.hidden_states, job.spec.resources.gpus_per_worker > 0
    if asked.memory_bytes is not None:
        room = reserved(job, boundary)
    else:
        # Half of it: a machine that is used to its last byte ends processes.
        bounds = [GPU_ROOM if gpu else None, None if free is None else free // 2]
        room = max(0, min(2 * boundary, *(bound for bound in bounds if bound is not None)))
    every = asked.durable_every if asked.durable_every is not None else GPU_EVERY if gpu else 1
    return HiddenStatesPlan(
        boundary_bytes=boundary,
        memory_bytes=room,
        durable_every=every,
        blocks=blocks,
    )
