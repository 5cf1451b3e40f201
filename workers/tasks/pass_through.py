"""Tensors outside the blocks that the artifact carries over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from counterweight.workers.config import Config
from counterweight.workers.keys import digest
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import LedgerEntry, Timing
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class PassThroughRecord(Record):
    """Tensors carried over: one checkpoint shard."""

    checkpoint: Blob
    tensors: Mapping[str, str]
    ledger: tuple[LedgerEntry, ...]
    bits: int = Field(ge=0)
    timing: Timing

    @property
    def stored(self) -> tuple[Blob, ...]:
        return (self.checkpoint,)


class PassThrough(Config, DurableTask[PassThroughRecord]):
    """Carries tensors outside the blocks over into a checkpoint shard of their own, rotated where the model is. tensors: name
    -> sha256. reason: why they are not quantized, where it is not that they are the model's ends."""

    kind: ClassVar[str] = "keep"
    record: ClassVar[type[PassThroughRecord]] = PassThroughRecord

    setting: Setting
    tensors: Mapping[str, str]
    reason: str = ""
    bytes: int = 0
    """Read and written, and floating-point operations of a rotation: for `Task.patience`, no part of the result."""
    flops: int = 0

    @property
    def patience(self) -> float:
        return patience(bytes=self.bytes, flops=self.flops, device=self.setting.device)

    @property
    def name(self) -> str:
        first, *others = self.tensors
        return f"kept tensors ({', '.join([first, *others] if len(others) < 3 else [first, f'{len(others)} more'])})"

    def key(self) -> str:
        return digest([self.kind, self.setting.determines(), dict(self.tensors)])

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> PassThroughRecord:
        from counterweight.workers.block import tensor_bits
        from counterweight.workers.checkpoint.digest import tensor_digest
        from counterweight.workers.clock import Clock
        from counterweight.workers.tensor_blobs import put_tensors

        clock = Clock(context.device)
        checkpoint, builder = context.source(self.setting)
        tensors = checkpoint.read_many(self.tensors, sha256=self.tensors)
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in tensors}
        if self.setting.rotation is not None:
            tensors, sources = self.setting.rotation.outside(tensors, builder.layout)
        clock.lap("load")
        blob = put_tensors(workspace, tensors)
        clock.lap("write")
        return PassThroughRecord(
            checkpoint=blob,
            tensors={name: tensor_digest(tensor) for name, tensor in tensors.items()},
            ledger=tuple(
                LedgerEntry(
                    source=source,
                    shape=checkpoint.entry(source).shape,
                    fate="kept",
                    stored_as=stored,
                    reason=self.reason,
                )
                for source, stored in sources.items()
            ),
            bits=sum(tensor_bits(tensor) for tensor in tensors.values()),
            timing=clock.timing(),
        )
