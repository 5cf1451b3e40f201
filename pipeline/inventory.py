"""The first look at the source's bytes: a digest of every tensor, and no NaN."""

from __future__ import annotations

from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.model_source import ModelSource, check_stored_head
from counterweight.workers.checkpoint.inspector import TensorDigest
from counterweight.workers.errors import CheckpointError
from counterweight.workers.tasks.inspect import Inspect

INSPECT_BYTES = 1 << 30
"""Source bytes per task: enough to keep a worker busy, small enough to spread a model over many."""

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
    """Tensors that lie together, in batches of about `INSPECT_BYTES`."""
    entry = source.checkpoint.entry
    found: list[list[str]] = [[]]
    size = 0
    for name in sorted(source.tensors, key=lambda n: (entry(n).file, entry(n).start)):
        length = entry(name).length
        if found[-1] and size + length > INSPECT_BYTES:
            found.append([])
            size = 0
        found[-1].append(name)
        size += length
    return found
