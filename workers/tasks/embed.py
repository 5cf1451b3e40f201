"""The embedding: tokens to the hidden states that enter block 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.keys import digest
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import HiddenRecord, Timing
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from counterweight.workers.context import TaskContext


class Embed(Config, DurableTask[HiddenRecord]):
    """Token ids to hidden states, cut into shards: all of them, or shards [start, stop), of which no record is kept. How shards
    are divided is no part of a result: a stretch is found where the whole is."""

    kind: ClassVar[str] = "embed"
    record: ClassVar[type[HiddenRecord]] = HiddenRecord

    setting: Setting
    tokens: Blob
    """A safetensors blob with `input_ids` [sequences, length] int32."""
    tensor: tuple[str, str]
    """Name and sha256 of the embedding."""
    bytes: int = 0
    """Read and written, and floating-point operations of a rotation: for `Task.patience`, no part of the result."""
    flops: int = 0
    drawn: int = 0
    """Sequences before those that are held out, that only some experts are solved on: in shards of their own."""
    held_out: int = 0
    """The last sequences, that nothing is solved on: likewise."""
    start: int = 0
    stop: int | None = None
    """None: to the last."""
    parts: tuple[HiddenRecord, ...] = ()
    """What others have made of its stretches, all of them in order; empty: nothing."""

    def of(self, start: int, stop: int) -> Embed:
        """The task of these shards."""
        return self.model_copy(update={"start": start, "stop": stop})

    def joined(self, parts: Iterable[HiddenRecord]) -> Embed:
        """The task that keeps the record of the whole, of its stretches."""
        return self.model_copy(update={"parts": tuple(parts)})

    @property
    def name(self) -> str:
        if self.stop is not None:
            return f"embedding, shards {self.start} to {self.stop - 1}"
        return "embedding, all shards" if self.parts else "embedding"

    @property
    def patience(self) -> float:
        return patience(bytes=self.bytes, flops=self.flops, device=self.setting.device)

    def key(self) -> str:
        held_out = [self.held_out] if self.held_out else []
        drawn = [{"drawn": self.drawn}] if self.drawn else []
        return digest([self.kind, self.setting.determines(), self.tokens.sha256, self.tensor[1], *held_out, *drawn])

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def lookup(self, workspace: Workspace) -> HiddenRecord | None:
        found = super().lookup(workspace)
        return None if found is None else found.model_copy(update={"outputs": found.outputs[self.start : self.stop]})

    def run(self, context: TaskContext) -> HiddenRecord:
        return super().run(context) if self.stop is None else self.compute(context, self.workspace())

    def compute(self, context: TaskContext, workspace: Workspace) -> HiddenRecord:
        if self.parts:
            joined = tuple(blob for part in self.parts for blob in part.outputs)
            return HiddenRecord(outputs=joined, timing=Timing.of_all([part.timing for part in self.parts]))
        import torch

        from counterweight.workers.clock import Clock
        from counterweight.workers.context import DTYPES
        from counterweight.workers.passing import pass_on
        from counterweight.workers.tensor_blobs import get_tensors

        clock = Clock(context.device)
        checkpoint, builder = context.source(self.setting)
        name, sha256 = self.tensor
        weight = checkpoint.read(name, sha256=sha256)
        if self.setting.rotation is not None:
            weight = self.setting.rotation.embedding(weight)
        module = builder.embedding(weight, context.device, DTYPES[self.setting.compute_dtype])
        ids = get_tensors(workspace, self.tokens)["input_ids"]
        clock.lap("load")
        solved, together = len(ids) - self.drawn - self.held_out, shard_sequences(ids.shape[1])
        kinds = [kind for kind in ids.split([solved, self.drawn, self.held_out]) if len(kind)]
        parts = [part for kind in kinds for part in kind.split(together)][self.start : self.stop]

        def compute(part: Tensor) -> tuple[None, Tensor]:
            with torch.no_grad():
                return None, module(part.long().to(context.device))

        def emit(shard: Tensor) -> Blob:
            return pass_on(context, workspace, shard, room=self.setting.room, lasting=True)

        outputs = context.shards.run(parts, lambda part: part, compute, lambda _: None, emit)
        clock.lap("write")
        return HiddenRecord(outputs=tuple(outputs), timing=clock.timing())
