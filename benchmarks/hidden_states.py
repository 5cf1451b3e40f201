"""What hidden states cost on their way from block to block: through the store, in a worker's memory, and from worker to worker
through Ray's object store.

    python benchmarks/hidden_states.py [--manifest manifests/reference-llama-w4a16-g128.yaml] [--repeats 3]
                                       [--shared] [--record]

1. CPU seconds per GB of shards as a block of hidden size 4096 makes them, beside sha256 alone, which names them either way.
   With --shared through the object store too: its pages are taken when they are first written to, and stay for the shards
   behind.
2. A whole job without its validation, as a process, at each grain: wall and CPU seconds of the process and its worker, and
   bytes that they handed to the system. Sides take turns; the least and the median of each.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from common import ROOT, adopt_orphans, machine, measured, record, table, versions
from torch import Tensor

from counterweight.pipeline import ray_worker
from counterweight.pipeline.cluster import cluster
from counterweight.pipeline.passing import CommonMemory, Given
from counterweight.pipeline.pool import PoolSize
from counterweight.workers.passing import NAME, pass_on, receive
from counterweight.workers.storage import open_store
from counterweight.workers.tensor_blobs import blob_of
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Workspace

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


def shards(repeats: int, *, shared: bool) -> list[list[str]]:
    """Rows of CPU seconds per GB. shared: also through Ray's object store."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, seconds in (ways() | (shared_ways() if shared else {})).items():
            found.setdefault(name, []).append(seconds)
    return [[name, f"{min(each):.2f}", f"{statistics.median(each):.2f}"] for name, each in found.items()]


@contextmanager
def handing() -> Iterator[tuple[Worker, Callable[[int], object], Callable[[], None], list[Tensor]]]:
    """A worker, what hands shards on in so much room, what takes them over, and the shards."""
    hidden, worker = [torch.randn(SHARD) for _ in range(SHARDS)], Worker()
    blobs = [blob_of({NAME: shard}) for shard in hidden]
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(open_store(Path(scratch).as_uri()))

        def put(room: int) -> None:
            for shard in hidden:
                pass_on(worker.context, workspace, shard, room=room, lasting=False)

        def get() -> None:
            for blob in blobs:
                receive(worker.context, workspace, blob)

        yield worker, put, get, hidden
    worker.close()


SIZE = SHARDS * 4 * math.prod(SHARD)
"""Bytes of the shards."""


def per_gb(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of all shards -> of a GB."""
    return {name: found / (SIZE / 1e9) for name, found in seconds.items()}


def ways() -> dict[str, float]:
    """Way of one worker -> CPU seconds per GB."""
    with handing() as (_, put, get, hidden):

        def hashed() -> None:
            for shard in hidden:
                hashlib.sha256(shard.numpy().data).hexdigest()

        return per_gb(
            {
                "sha256 alone": cpu_seconds(hashed),
                "hand on, through the store": cpu_seconds(lambda: put(0)),
                "take over, from the store": cpu_seconds(get),
                "hand on, in memory": cpu_seconds(lambda: put(SIZE)),
                "take over, from memory": cpu_seconds(get),
            }
        )


def shared_ways() -> dict[str, float]:
    """Way of several workers -> CPU seconds per GB."""
    memory = CommonMemory(ray_worker.put, ray_worker.get)
    with handing() as (worker, put, get, _), cluster("local", PoolSize(workers=2, cpus=1, gpus=0.0)):
        worker.context.mailbox = memory
        new = cpu_seconds(lambda: put(SIZE))
        memory.end()
        until_free(SIZE)
        again = cpu_seconds(lambda: put(SIZE))
        memory.begin(Given({sha256: kept.reference for sha256, kept in memory.end().items()}))
        return per_gb(
            {
                "hand on, in the object store, new pages": new,
                "hand on, in the object store": again,
                "take over, from the object store": cpu_seconds(get),
            }
        )


def until_free(size: int) -> None:
    """Waits until nothing of so many bytes is in the object store any more."""
    import ray

    while (
        ray.available_resources().get("object_store_memory", 0.0)
        < ray.cluster_resources()["object_store_memory"] - size / 2
    ):
        time.sleep(0.1)


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
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(repeats):
        for name, grain in GRAINS.items():
            each = found.setdefault(name, [])
            each.append(job(manifest, grain))
            print(name, *(f"{figure:.4g}" for figure in each[-1]), flush=True)
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
    parser.add_argument(
        "--shared", action="store_true", help="through Ray's object store too, for which Ray is started"
    )
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    adopt_orphans()
    about = f"{machine()}. {versions('torch')}. {asked.repeats} repeats; least, median."
    parts = [
        table(["CPU s per GB", "least", "median"], shards(asked.repeats, shared=asked.shared)),
        "",
        f"`{Path(asked.manifest).name}`, without its validation:",
        "",
        table(
            ["hidden states", "wall s", "CPU s", "written"],
            jobs(asked.manifest, asked.repeats),
        ),
    ]
    body = "\n".join(parts)
    print(body)
    if asked.record:
        record("hidden-states", "Hidden states from block to block", body, about)


if __name__ == "__main__":
    main()
