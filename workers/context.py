"""What a task finds on the worker that runs it. Nothing in here is part of what a result is: that comes from the task."""

from __future__ import annotations

import torch

from counterweight.workers.ahead import ReadAhead
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.held_blocks import HOLD_BYTES, HeldBlocks
from counterweight.workers.held_training import HeldTraining
from counterweight.workers.join import BegunFiles
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.parallel import OrderedPool, Overlapped, Shards, SideBySide
from counterweight.workers.passing import Mailbox, OwnMemory
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.setting import Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TaskContext:
    """device: where tensors are computed with. pool: threads that share the solves. shards: how blocks are run over shards.
    ahead: what is read while it computes. held: blocks whose statistics are in memory. training: the model that is trained.
    mailbox: hidden states in memory. begun: files of all blocks' tensors that are being joined."""

    def __init__(self, device: torch.device, threads: int, hold_bytes: int = HOLD_BYTES) -> None:
        self.device = device
        self.pool = OrderedPool(threads)
        self.shards: Shards = SideBySide(self.pool) if device.type == "cpu" else Overlapped()
        self.ahead = ReadAhead(on=device.type != "cpu")
        self.held = HeldBlocks(hold_bytes)
        self.training = HeldTraining()
        self.mailbox: Mailbox = OwnMemory()
        self.begun = BegunFiles()
        self._sources: dict[str, tuple[Checkpoint, BlockBuilder]] = {}

    def source(self, setting: Setting) -> tuple[Checkpoint, BlockBuilder]:
        """The job's source model, opened; the last one is remembered."""
        if setting.source not in self._sources:
            self._sources.clear()
            checkpoint = Checkpoint.open(open_store(setting.source))
            self._sources[setting.source] = (checkpoint, BlockBuilder(setting.config, frozenset(checkpoint.names)))
        return self._sources[setting.source]

    def close(self) -> None:
        """Drops what is held and ends the threads."""
        self.held.clear()
        self.ahead.close()
        self.shards.close()
        self.training.keep(None)
        self.begun.drop()
        self.pool.close()
