"""A compressed model, trained as a whole behind the closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.keys import digest, versions
from counterweight.workers.methods.distillation import Distillation
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class StoredBlock(Config):
    """A compressed block as its task has stored it; see `BlockRecord`."""

    index: int
    checkpoint: Blob
    adapter: Blob | None
    """None where no linear of the block has a branch."""
    formats: Mapping[str, ModuleFormat]

    def determines(self) -> list[object]:
        """Its part of a key."""
        blobs = [blob.sha256 for blob in (self.checkpoint, self.adapter) if blob is not None]
        return [blobs, {name: form.model_dump(mode="json") for name, form in self.formats.items()}]


class TrainedBlock(Config):
    """A compressed block after training, as `BlockRecord` has it."""

    checkpoint: Blob
    adapter: Blob | None
    tensors: Mapping[str, str]
    factors: Mapping[str, str]


class DistillRecord(Record):
    """What training made of the model.

    kept: the epoch that is stored; 0: training won nothing, the blocks stay as they were. divergences: for each
    epoch from 0, before training, KL(original || compressed) of each held-out text in nats a token. losses: for each epoch from
    1, that of the training texts, in the mean over its steps. blocks: by index; empty when `kept` is 0. states: what training
    can be taken up from; of no use once the model is published.
    """

    kept: int
    divergences: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    blocks: Mapping[int, TrainedBlock]
    states: tuple[Blob, ...]
    timing: Timing

    @property
    def stored(self) -> tuple[Blob, ...]:
        blobs = [blob for block in self.blocks.values() for blob in (block.checkpoint, block.adapter)]
        return tuple(blob for blob in blobs if blob is not None)


class EpochRecord(Record):
    """A training behind an epoch; see `workers.distillation.training.State`."""

    state: Blob
    best: int
    divergences: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]


class Distill(Config, DurableTask[DistillRecord]):
    """Trains all blocks together on the divergence from the original. After each epoch its state is committed, so that a
    task that was killed goes on behind its last epoch, to the same bits."""

    kind: ClassVar[str] = "distill"
    record: ClassVar[type[DistillRecord]] = DistillRecord

    setting: Setting
    options: Distillation
    tensors: Mapping[str, str]
    """Source tensors behind the blocks, of the original's head -> sha256."""
    outside: tuple[Blob, Blob]
    """What the artifact holds before and behind the blocks."""
    blocks: tuple[StoredBlock, ...]
    tokens: Blob
    """A safetensors blob with `input_ids` [sequences, length] int32: the training texts, then the held-out ones."""
    targets: tuple[Blob, ...]
    """The original's last hidden states of these sequences, one blob per shard."""
    trained: int
    """Sequences that are trained on."""
    held_out: tuple[int, ...]
    """Sequences of each held-out text."""

    def key(self) -> str:
        return digest(
            [
                self.kind,
                {**self.setting.determines(), "compute_dtype": "float32"},
                self.options.model_dump(mode="json"),
                versions(self.options),
                dict(self.tensors),
                [blob.sha256 for blob in self.outside],
                [block.determines() for block in self.blocks],
                self.tokens.sha256,
                [blob.sha256 for blob in self.targets],
                self.trained,
                self.held_out,
            ]
        )

    @property
    def name(self) -> str:
        return "distillation"

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> DistillRecord:
        from counterweight.workers.distilled import distilled

        return distilled(context, self, workspace)
