"""What the original model makes of sequences: the hidden states that enter its final norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.keys import digest
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import HiddenRecord
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class Original(Config, DurableTask[HiddenRecord]):
    """Sequences [start, stop) of a token set through all blocks of the source model, in its own coordinates and in float32; one
    block is in memory at a time."""

    kind: ClassVar[str] = "original"
    record: ClassVar[type[HiddenRecord]] = HiddenRecord

    setting: Setting
    tensors: Mapping[str, str]
    """Every source tensor -> sha256."""
    tokens: Blob
    """A safetensors blob with `input_ids` [sequences, length] int32."""
    start: int
    stop: int

    def key(self) -> str:
        shared = self._plain().determines()
        return digest([self.kind, shared, dict(self.tensors), self.tokens.sha256, self.start, self.stop])

    @property
    def name(self) -> str:
        return f"original on sequences {self.start} to {self.stop - 1}"

    @property
    def patience(self) -> float:
        parameters, tokens = self.setting.parameters, self.tokens.size // 4  # of all sequences, which are int32
        return patience(bytes=4 * parameters, flops=2 * parameters * tokens, device=self.setting.device)

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> HiddenRecord:
        import torch

        from counterweight.workers.clock import Clock
        from counterweight.workers.context import put_hidden
        from counterweight.workers.evaluation import advance
        from counterweight.workers.loaded_block import load_block
        from counterweight.workers.memory import release
        from counterweight.workers.models.block_builder import Block

        clock = Clock(context.device)
        checkpoint, builder = context.source(self.setting)
        name = builder.names.embedding
        embed = builder.embedding(checkpoint.read(name, sha256=self.tensors[name]), context.device, torch.float32)
        ids = workspace.get_tensors(self.tokens)["input_ids"][self.start : self.stop].long().to(context.device)
        with torch.no_grad():
            hidden = [embed(batch) for batch in ids.split(shard_sequences(ids.shape[1]))]

        def blocks(index: int) -> dict[str, Block]:
            release(context.device)
            names = {part.source for part in builder.layout.sources(index, self.tensors).values()}
            digests = {name: self.tensors[name] for name in names}
            return {self.kind: load_block(context, self._plain(), index, digests, torch.float32).block}

        found = advance({self.kind: hidden}, blocks, builder.blocks, context.pool)[self.kind]
        clock.lap("forward")
        outputs = tuple(put_hidden(workspace, batch) for batch in found)
        clock.lap("write")
        return HiddenRecord(outputs=outputs, timing=clock.timing())

    def _plain(self) -> Setting:
        return self.setting.model_copy(update={"rotation": None, "compute_dtype": "float32"})
