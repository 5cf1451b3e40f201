"""What every task of a job shares, and how its tokens are cut into shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from counterweight.workers.config import Config
from counterweight.workers.dtypes import ComputeDtype
from counterweight.workers.keys import numerics, versions
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.storage import open_store
from counterweight.workers.workspace import Workspace

SHARD_TOKENS = 8192
"""Tokens of one shard of hidden states. Part of the numerics: statistics are reduced shard by shard."""


def shard_sequences(length: int) -> int:
    """Sequences of `length` tokens in one shard of hidden states."""
    return max(1, SHARD_TOKENS // length)


IRRELEVANT_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of config.json that cannot change a block's result."""

Device = Literal["cpu", "cuda"]


class Setting(Config):
    """What every task of a job shares."""

    source: str
    """Root URI of the source checkpoint."""
    config: Mapping[str, object]
    """The source's config.json."""
    workspace: str
    """Root URI of the durable state."""
    compute_dtype: ComputeDtype
    device: Device
    """Where the arithmetic was asked to run: bits differ between kinds of device, so results do not mix."""
    rotation: Rotation | None = None
    """Coordinates in which the model is compressed; null: its own."""
    room: int = 0
    """Bytes of hidden states that a worker keeps in memory for the tasks that read them; no part of a result."""
    parameters: int = 0
    """Of the source model, for `Task.patience`; no part of a result."""
    run: str = ""
    """Nonce of a run that shares no work with any other; empty for all that do. It enters keys and no result."""

    def open_workspace(self) -> Workspace:
        """Where the job's results are kept."""
        return Workspace(open_store(self.workspace), trusting=not self.run)

    def uncompressed(self) -> Setting:
        """The setting of what is computed with the model as it is, in its own coordinates."""
        return self.model_copy(update={"rotation": None})

    def determines(self) -> dict[str, object]:
        """The part of a key that all tasks share."""
        config = {name: value for name, value in self.config.items() if name not in IRRELEVANT_CONFIG}
        return {
            "numerics": numerics(),
            "config": config,
            "compute_dtype": self.compute_dtype,
            "device": self.device,
            "shard_tokens": SHARD_TOKENS,
            "rotation": None if self.rotation is None else self.rotation.model_dump(mode="json"),
            "versions": versions(self.rotation),
            **({"run": self.run} if self.run else {}),
        }
