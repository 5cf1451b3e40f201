"""From a manifest to a published artifact: what `counterweight run` does, for callers in Python too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from counterweight.pipeline.events import EventLog
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.pool import PoolSize, RayPool, cluster, threads_per_worker
from counterweight.pipeline.preflight import look
from counterweight.workers.errors import WorkerError
from counterweight.workers.process import importing

if TYPE_CHECKING:
    from counterweight.pipeline.artifact import Published
    from counterweight.pipeline.progress import Progress
    from counterweight.workers.tasks.setting import Device


def run_job(job: CompressionJob, progress: Progress, *, address: str | None = None) -> Published:
    """Runs a job to its end on an embedded Ray, or on the one at `address`.

    Raises RequestError (the manifest, the model, the texts, an object store without an atomic create), GateError,
    SurroundingsError; nothing is published then.
    """
    size = pool_size(job, address)
    ready = look(job)  # what is wrong with a model or a text is known before anything is started for it
    with EventLog(progress) as log, cluster(address, size):
        pool = RayPool(size)
        try:
            # Workers load torch and transformers now, and so does this process with torch. Not while Ray starts: an import
            # holds the interpreter that starts it.
            with importing():
                from counterweight.pipeline.opening import open_job
                from counterweight.pipeline.orchestrator import Orchestrator
            source, tokens = open_job(job, pool, log, here=_embedded(address), ready=ready)
            device = _device(pool.devices(), size.device, log)
            return Orchestrator(job, source, tokens, pool, device, log).run()
        finally:
            pool.close()


def pool_size(job: CompressionJob, address: str | None) -> PoolSize:
    """Workers as the manifest asks; on an embedded cluster they share this machine's CPUs unless it says otherwise."""
    resources = job.spec.resources
    available = sorted(os.sched_getaffinity(0)) if _embedded(address) else [0]
    cpus = threads_per_worker(resources.cpus_per_worker, resources.workers, available=available)
    return PoolSize(workers=resources.workers, cpus=cpus, gpus=resources.gpus_per_worker)


def _device(found: Sequence[str], asked: Device, log: EventLog) -> Device:
    """What the workers compute on, which is part of every key; WorkerError when they differ, because bits would too."""
    kinds = sorted(set(found))
    if len(kinds) > 1:
        raise WorkerError(f"workers compute on {' and '.join(kinds)}: expected the same kind of device everywhere")
    if kinds != [asked]:
        log.note(f"no {asked} device on the workers' machines: they compute on the {kinds[0]}")
    return "cuda" if kinds == ["cuda"] else "cpu"


def _embedded(address: str | None) -> bool:
    return address in (None, "local")
