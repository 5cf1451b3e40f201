"""How much memory a job's workers have, and what does not fit into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from counterweight.pipeline.devices import USABLE, memory_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.units import bytes_text

PROCESS_BYTES = 600 << 20
"""A worker process with torch, transformers and Ray imported, before its first task (measured: 480-560 MiB)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """bytes: what tasks of a worker may take where the arithmetic is done. whose: in words."""

    bytes: int
    whose: str


def worker_memory(job: CompressionJob, device: str | None, gpu_bytes: int = 0) -> Memory | None:
    """What blocks are divided for: the manifest's word or the GPU that is named, whichever is less; without both, the share of
    this machine of a worker without GPUs. gpu_bytes: of the GPU that a worker has, 0 where nobody knows. None: nothing is known
    of a GPU."""
    resources = job.spec.resources
    found: list[Memory] = []
    if (asked := resources.memory_bytes) is not None:
        process = 0 if resources.gpus_per_worker else PROCESS_BYTES
        found.append(Memory(asked - process, f"spec.resources.memory_per_worker is {bytes_text(asked)}"))
    if device is not None:
        own = int(memory_of(device) * min(1.0, resources.gpus_per_worker or 1.0))
        found.append(Memory(own, f"a worker has {bytes_text(own)} of {device}"))
    if gpu_bytes and resources.gpus_per_worker:
        own = int(gpu_bytes * USABLE * min(1.0, resources.gpus_per_worker))
        found.append(Memory(own, f"a worker has {bytes_text(own)} of its GPU"))
    if not found and resources.gpus_per_worker == 0:
        machine = _machine_bytes()
        found.append(Memory(machine // resources.workers - PROCESS_BYTES, f"this machine has {bytes_text(machine)}"))
    return min(found, key=lambda memory: memory.bytes, default=None)


def misfits(job: CompressionJob, need: int, where: str, device: str | None, memory: Memory | None) -> Iterator[str]:
    """What does not fit: the memory that blocks are divided for; or this machine, with workers that have no GPUs. need: bytes
    of a worker's tasks at the peak, where: when that is."""
    resources = job.spec.resources
    if (device is not None or resources.memory_bytes is not None) and memory is not None and need > memory.bytes:
        process, place = (0, " of a GPU") if device is not None or resources.gpus_per_worker else (PROCESS_BYTES, "")
        yield f"{where.partition(',')[0]} needs {bytes_text(need + process)}{place}: {memory.whose}"
    elif device is None and resources.gpus_per_worker == 0:
        each, machine = PROCESS_BYTES + need, _machine_bytes()
        if each * resources.workers > machine:
            total = bytes_text(each * resources.workers)
            yield f"{resources.workers} workers of {bytes_text(each)} need {total}: this machine has {bytes_text(machine)}"


def host_bytes(job: CompressionJob, device: str | None) -> int | None:
    """Of this machine, a worker's share; None where the workers' GPU is named, whose host is another."""
    return _machine_bytes() // job.spec.resources.workers if device is None else None


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
