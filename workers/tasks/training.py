"""What a training of the compressed model is: all that its tasks share, and that determines every one of their results."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.config import Config
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.keys import digest, versions
from counterweight.workers.methods.distillation import Distillation
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.workspace import Blob


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


class TrainingSpec(Config):
    """A training of all blocks together on the divergence from the original."""

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

    @property
    def patience(self) -> float:
        """Of the longest of its tasks: one epoch on one worker; see `Task.patience`. A token costs a forward and a backward
        pass, and the forward pass again where blocks are recomputed."""
        parameters, tokens = self.setting.parameters, self.tokens.size // 4  # int32
        return patience(bytes=8 * parameters, flops=8 * parameters * tokens, device=self.setting.device)

    def key(self) -> str:
        """Digest of everything that determines what is stored in the end, and with it every state on the way."""
        return digest(
            [
                "distill",
                {**self.setting.determines(), "compute_dtype": "float32"},
                self.options.determines(),
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
