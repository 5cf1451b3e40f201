"""What the original model makes of sequences: what enters its final norm, and where its routers send tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.dtypes import ModelDtype
from counterweight.workers.keys import digest
from counterweight.workers.parallel import PIECE_TOKENS
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext
    from counterweight.workers.evaluation import Chosen


class OriginalRecord(HiddenRecord):
    """outputs: what enters the final norm, one blob per shard. routed: of a sparse model, see `Routes`: block -> packed."""

    routed: Blob | None = None

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        return (*self.outputs, *(() if self.routed is None else (self.routed,)))


class Original(Config, DurableTask[OriginalRecord]):
    """Sequences [start, stop) of a token set through all blocks of the source model, in its own coordinates; one block is in
    memory at a time, on a GPU two. Whatever is compressed and how: every recipe that is judged on these tokens shares it."""

    kind: ClassVar[str] = "original"
    record: ClassVar[type[OriginalRecord]] = OriginalRecord

    setting: Setting
    tensors: Mapping[str, str]
    """Every source tensor -> sha256."""
    tokens: Blob
    """A safetensors blob with `input_ids` [sequences, length] int32."""
    start: int
    stop: int
    dtype: ModelDtype = "float32"
    """Type that the model computes in."""
    shared: bool = False
    """Whether other workers read the model at the same time, perhaps on the same machine. No part of the result."""

    def key(self) -> str:
        shared = {**self.setting.uncompressed().determines(), "compute_dtype": self.dtype}
        return digest(
            [self.kind, shared, "routed", PIECE_TOKENS, dict(self.tensors), self.tokens.sha256, self.start, self.stop]
        )

    @property
    def name(self) -> str:
        return f"original on sequences {self.start} to {self.stop - 1} of {self.tokens.sha256[:8]}"

    @property
    def patience(self) -> float:
        parameters, tokens = self.setting.parameters, self.tokens.size // 4  # of all sequences, which are int32
        return patience(bytes=4 * parameters, flops=2 * parameters * tokens, device=self.setting.device)

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> OriginalRecord:
        checkpoint, _ = context.source(self.setting)
        with checkpoint.shared(digest(dict(self.tensors))) if self.shared else nullcontext():
            return self._run(context, workspace)

    def _run(self, context: TaskContext, workspace: Workspace) -> OriginalRecord:
        import torch

        from counterweight.workers.clock import Clock
        from counterweight.workers.context import DTYPES
        from counterweight.workers.evaluation import advance
        from counterweight.workers.loaded_block import load_block
        from counterweight.workers.memory import release
        from counterweight.workers.models.block_builder import Block
        from counterweight.workers.models.routing import Routes
        from counterweight.workers.passing import pass_on
        from counterweight.workers.tensor_blobs import get_tensors, put_tensors

        clock, dtype = Clock(context.device), DTYPES[self.dtype]
        checkpoint, builder = context.source(self.setting)
        name = builder.names.embedding
        embed = builder.embedding(checkpoint.read(name, sha256=self.tensors[name]), context.device, dtype)
        ids = get_tensors(workspace, self.tokens)["input_ids"][self.start : self.stop].long().to(context.device)
        with torch.no_grad():
            hidden = [embed(batch) for batch in ids.split(shard_sequences(ids.shape[1]))]
        setting, routes = self.setting.uncompressed(), Routes()

        def blocks(index: int) -> dict[str, Block]:
            release(context.device)
            names = {part.source for part in builder.layout.sources(index, self.tensors).values()}
            digests = {name: self.tensors[name] for name in names}
            return {self.kind: load_block(context, setting, index, digests, dtype).block}

        def routed(index: int, _: str, chosen: Chosen) -> None:
            routes.add(index, chosen)

        turn = context.ahead.in_turn(self.name, builder.blocks, blocks)
        found = advance({self.kind: hidden}, turn, context.pool, routed)[self.kind]
        clock.lap("forward")
        outputs = tuple(pass_on(context, workspace, batch, room=0, lasting=True) for batch in found)
        packed = {str(block): choices for block, choices in routes.packed.items()}
        stored = put_tensors(workspace, packed, durable=False) if packed else None
        clock.lap("write")
        return OriginalRecord(outputs=outputs, routed=stored, timing=clock.timing())
