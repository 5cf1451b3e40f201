"""What hidden states cost on their way from block to block: through the store, and in a worker's memory.

    python benchmarks/hidden_states.py [--manifest manifests/reference-llama-w4a16-g128.yaml] [--repeats 3] [--record]

1. CPU seconds per GB of shards as a block of hidden size 4096 makes them, beside sha256 alone, which names them either way.
2. A whole job without its validation, as a process, at each grain: wall and CPU seconds of the process and its worker, and
   bytes that they handed to the system. Sides take turns; the least and the median of each.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import ROOT, adopt_orphans, machine, measured, record, table, versions

from counterweight.workers.passing import NAME, pass_on, receive
from counterweight.workers.storage import open_store
from counterweight.workers.tensor_blobs import blob_of
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob, Workspace

SHARD = (4, 2048, 4096)
"""Sequences, length, hidden size."""
SHARDS = 4

GRAINS = {
    "through the store": ("memory=0MiB",),
    "memory, each boundary written": ("durable_every=1",),
    "memory, one of 8 written": ("durable_every=8",),
    "memory, none written": ("durable_every=0",),
}


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def shards(repeats: int) -> list[list[str]]:
    """Rows of CPU seconds per GB."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, seconds in ways().items():
            found.setdefault(name, []).append(seconds)
    return [[name, f"{min(each):.2f}", f"{statistics.median(each):.2f}"] for name, each in found.items()]


def ways() -> dict[str, float]:
    """Way -> CPU seconds per GB."""
    hidden = [torch.randn(SHARD) for _ in range(SHARDS)]
    size = sum(shard.nbytes for shard in hidden)
    worker = Worker()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(open_store(Path(scratch).as_uri()))

        def put(room: int) -> list[Blob]:
            return [pass_on(worker.context, workspace, shard, room=room, lasting=False) for shard in hidden]

        def get() -> None:
            for blob in blobs:
                receive(worker.context, workspace, blob)

        def hashed() -> None:
            for shard in hidden:
                hashlib.sha256(shard.numpy().data).hexdigest()

        blobs = [blob_of({NAME: shard}) for shard in hidden]
        found = {
            "sha256 alone": cpu_seconds(hashed),
            "hand on, through the store": cpu_seconds(lambda: put(0)),
            "take over, from the store": cpu_seconds(get),
            "hand on, in memory": cpu_seconds(lambda: put(size)),
            "take over, from memory": cpu_seconds(get),
        }
    worker.close()
    return {name: seconds / (size / 1e9) for name, seconds in found.items()}


def written() -> int:
    """Bytes that this process and those that it has waited for handed to the system."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def job(manifest: str, grain: Sequence[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and bytes written."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"spec.resources.hidden_states.{one}" for one in grain] + ["spec.validation="]
        command = [sys.executable, "-m", "counterweight.pipeline.cli", "run", manifest, "--output", scratch, "--quiet"]
        for one in settings:
            command += ["--set", one]
        before = written()
        usage = measured(command, ROOT, {})
        return usage.wall, usage.cpu, written() - before


def jobs(manifest: str, repeats: int) -> list[list[str]]:
    """Rows of whole jobs."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in GRAINS}
    for _ in range(repeats):
        for name, grain in GRAINS.items():
            found[name].append(job(manifest, grain))
            print(name, *(f"{figure:.4g}" for figure in found[name][-1]), flush=True)
    rows = []
    for name, each in found.items():
        walls, cpus, sizes = zip(*each, strict=True)
        rows.append(
            [
                name,
                f"{min(walls):.1f}, {statistics.median(walls):.1f}",
                f"{min(cpus):.1f}, {statistics.median(cpus):.1f}",
                f"{statistics.median(sizes) / 2**20:.0f} MiB",
            ]
        )
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default="manifests/reference-llama-w4a16-g128.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    adopt_orphans()
    about = f"{machine()}. {versions('torch')}. {asked.repeats} repeats; least, median."
    parts = [
        table(["CPU s per GB", "least", "median"], shards(asked.repeats)),
        "",
        f"`{Path(asked.manifest).name}`, without its validation:",
        "",
        table(["hidden states", "wall s", "CPU s", "written"], jobs(asked.manifest, asked.repeats)),
    ]
    body = "\n".join(parts)
    print(body)
    if asked.record:
        record("hidden-states", "Hidden states from block to block", body, about)


if __name__ == "__main__":
    main()
