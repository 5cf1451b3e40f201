"""The first look at the source's bytes: a digest of every tensor, and no NaN."""

from __future__ import annotations

from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.model_source import ModelSource, check_stored_head
from counterweight.pipeline.neighbours import TASK_BYTES, neighbours
from counterweight.workers.checkpoint.inspector import TensorDigest
from counterweight.workers.errors import CheckpointError
from counterweight.workers.tasks.inspect import Inspect

SHOWN = 20
"""Bad tensors listed in one error."""


def inventory(source: ModelSource, dispatcher: Dispatcher) -> dict[str, str]:
    """sha256 of every source tensor, by workers, each byte read once.

    Keys of durable work are made from these, and every later read is checked against them. CheckpointError listing the
    tensors that hold NaN or infinity.
    """
    parts = batches(source)
    tasks = [
        Inspect(
            source=source.uri,
            names=batch,
            part=f"{number + 1} of {len(parts)}",
            bytes=sum(source.checkpoint.entry(name).length for name in batch),
        )
        for number, batch in enumerate(parts)
    ]
    found: dict[str, TensorDigest] = {}
    for part in dispatcher.run_all(tasks):
        found |= part
    bad = sorted(name for name, tensor in found.items() if not tensor.finite)
    if bad:
        lines = [f"{source.checkpoint.entry(name).file}: {name}: holds NaN or infinity" for name in bad[:SHOWN]]
        raise CheckpointError("\n".join([*lines, f"expected finite weights; {len(bad)} tensors are not"]))
    digests = {name: tensor.sha256 for name, tensor in found.items()}
    check_stored_head(source, digests)
    return digests


def batches(source: ModelSource) -> list[list[str]]:
    """Tensors that lie together, a task's in each."""
    entry = source.checkpoint.entry
    names = sorted(source.tensors, key=lambda name: (entry(name).file, entry(name).start))
    return [[names[place] for place in part] for part in neighbours([entry(name).length for name in names], TASK_BYTES)]
