"""From a manifest to a published artifact: what `counterweight run` does, for callers in Python too."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

from counterweight.pipeline.cluster import cluster
from counterweight.pipeline.events import Doing, EventLog, Expected
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.observability.sinks import sinks
from counterweight.pipeline.place import Place
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.pool import PoolSize, StartedPool, threads_per_worker
from counterweight.pipeline.preflight import Ready, look
from counterweight.pipeline.ray_pool import RayPool
from counterweight.workers.errors import CounterweightError
from counterweight.workers.identity import Token, identity
from counterweight.workers.process import importing
from counterweight.workers.storage import ObjectStore
from counterweight.workers.storage.outages import OUTAGES
from counterweight.workers.storage.probe import PROBES

LATEST = "latest.json"
"""Names the newest artifact of a name; `artifact.document` says the same, but imports torch."""

if TYPE_CHECKING:
    from counterweight.pipeline.artifact import Published
    from counterweight.pipeline.progress import Progress
    from counterweight.workers.tasks.setting import Device


def run_job(
    job: CompressionJob,
    progress: Progress,
    *,
    address: str | None = None,
    resume: Resume = Resume.AUTO,
    beside: Sequence[CompressionJob] = (),
) -> Published:
    """Runs a job to its end, on workers as `address` says (see `Place`). resume: what it takes over of earlier runs. beside:
    jobs whose blocks are compressed from the same calibration, where that is possible (`pipeline.beside`).

    Raises RequestError (the manifest, the model, the texts, an object store without an atomic create), GateError,
    SurroundingsError; nothing is published then.
    """
    place = Place.of(job, address)
    size = pool_size(job, place)
    with EventLog(progress) as log, _told(log):
        for reader in sinks(os.environ, log.note):
            log.add(reader)
        log.emit(Doing("looking at the model and its texts"))
        ready = look(job)  # what is wrong with a model or a text is known before anything is started for it
        if place.ray and resume is not Resume.NEVER and (done := _finished(job, ready, size, log)) is not None:
            return done
        if stages := _expected(job, ready, place):
            log.emit(Expected(stages))
        with _pool(place, size, ready.output, log) as pool:
            log.emit(Doing("loading torch" if place.ray else "loading torch and transformers"))
            # Ray's workers load torch and transformers now, and so does this process with torch. Not while Ray starts: an
            # import holds the interpreter that starts it.
            with importing():
                from counterweight.pipeline.opening import open_job
                from counterweight.pipeline.orchestrator import Orchestrator
            device = cache(lambda: _device(pool.first().device, size.device, log))
            memory = cache(lambda: pool.first().gpu_bytes)
            opened = open_job(job, pool, log, here=place.here, ready=ready, device=device, gpu_bytes=memory)
            if not place.ray:
                log.note(f"workers: {size.workers} of this machine, without Ray")
            return Orchestrator(job, opened, pool, device(), log, resume, beside).run()


def _finished(job: CompressionJob, ready: Ready, size: PoolSize, log: EventLog) -> Published | None:
    """The artifact of a job that is done already. Nothing is imported for it where no artifact of that name is there."""
    if not ready.output.exists(f"{job.metadata.name}/{LATEST}"):
        return None
    with importing():
        from counterweight.pipeline.finished import finished
    return finished(job, ready, size.device, size.workers, log)


def _expected(job: CompressionJob, ready: Ready, place: Place) -> Mapping[str, float]:
    """Stage -> seconds, as far as they are known."""
    with importing():
        from counterweight.pipeline.expecting import expected_stages
    return expected_stages(job, ready.root, forked=not place.ray)


@contextmanager
def _pool(place: Place, size: PoolSize, output: ObjectStore, log: EventLog) -> Iterator[StartedPool]:
    """The workers of a job, which end with the context."""
    if not place.ray:
        log.emit(Doing("starting workers"))
        from counterweight.pipeline.forked_pool import ForkedPool

        with closing(ForkedPool(size, note=log.note)) as forked:
            yield forked
        return
    log.emit(Doing("starting Ray" if place.here else f"connecting to Ray at {place.address}"))
    with (
        cluster(place.address, size),
        _shown(output) as token,
        closing(RayPool(size, token=token, expected=identity(), note=log.note)) as pool,
    ):
        yield pool


@contextmanager
def _told(log: EventLog) -> Iterator[None]:
    """Notes it when this process waits for storage."""
    OUTAGES.listener = log.note
    try:
        yield
    finally:
        OUTAGES.listener = None


@contextmanager
def _shown(output: ObjectStore) -> Iterator[Token]:
    """An object in the job's output that its workers have to see; deleted at the end."""
    token = Token(uri=output.uri, key=f"{PROBES}/{uuid.uuid4().hex}/seen", value=uuid.uuid4().bytes)
    output.write(token.key, token.value)
    try:
        yield token
    finally:
        # What went wrong before is the news.
        with suppress(CounterweightError):
            output.delete(token.key)


def pool_size(job: CompressionJob, place: Place) -> PoolSize:
    """Workers as the manifest asks; on this machine they share its CPUs unless it says otherwise."""
    resources = job.spec.resources
    available = sorted(os.sched_getaffinity(0)) if place.here else [0]
    cpus = threads_per_worker(resources.cpus_per_worker, resources.workers, available=available)
    return PoolSize(workers=resources.workers, cpus=cpus, gpus=resources.gpus_per_worker)


def _device(found: str, asked: Device, log: EventLog) -> Device:
    """What the workers compute on, which is part of every key."""
    if found != asked:
        log.note(f"no {asked} device on the workers' machines: they compute on the {found}")
    return "cuda" if found == "cuda" else "cpu"
