"""A worker that is held in the middle of a block: processes can be struck there, however slow or busy the machine is."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

from counterweight.workers.tasks.block import COMPRESS
from counterweight.workers.workspace import BLOBS, COMMITS, PRUNES


class HeldBlock:
    """Holds the worker that compresses a block in the middle of its task, until `release`: it has stored the block's shard and
    not committed it. It waits there for a prune that is about to delete the shard, as `workers.workspace` tells; the prune's
    list is this one. Make it before the job begins."""

    def __init__(self, output: Path, shard: str) -> None:
        """output: the job's. shard: sha256 of what the block's task is going to store, as an earlier run has it."""
        self._blob = output / BLOBS / shard
        self._list = output / PRUNES / uuid.uuid4().hex
        self._list.parent.mkdir(parents=True, exist_ok=True)
        self._list.write_text(f"{BLOBS}/{shard}\n")
        tomorrow = time.time() + 86400
        os.utime(self._list, (tomorrow, tomorrow))  # or the list would lapse

    def reached(self) -> bool:
        """Whether a worker is there."""
        return self._blob.exists()

    def release(self) -> None:
        """Lets it go on."""
        self._list.unlink()


def shards_of(output: Path) -> list[str]:
    """sha256 of the shard of each block that a job has stored in its output."""
    records = [json.loads(path.read_text()) for path in (output / COMMITS / COMPRESS).iterdir()]
    return [record["checkpoint"]["sha256"] for record in sorted(records, key=lambda record: record["index"])]
