"""Whether a job is done already: seen by its driver alone, before Ray and workers start for nothing."""

from __future__ import annotations

from counterweight.pipeline.artifact import Artifact, Published
from counterweight.pipeline.artifact.identity import artifact_id, software
from counterweight.pipeline.artifact.publish import latest, repair_pointer
from counterweight.pipeline.event_store import EventStore
from counterweight.pipeline.events import ArtifactPublished, Doing, EventLog, JobAdmitted, JobStarted
from counterweight.pipeline.inventory import batches
from counterweight.pipeline.judging.task_files import read_documents
from counterweight.pipeline.manifest import CompressionJob, job_id
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.preflight import Ready
from counterweight.pipeline.sizes import source_bytes
from counterweight.pipeline.tokens import read_tokens
from counterweight.workers.calibration.source import ModelSamples
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.setting import Device
from counterweight.workers.worker import Worker

LARGEST = 8 << 30
"""Bytes of a model that one process reads and hashes about as fast as Ray starts workers that share it."""


def finished(job: CompressionJob, ready: Ready, device: Device, workers: int, log: EventLog) -> Published | None:
    """The job's artifact, where it is published; None where it is not, and where looking would take longer than it is worth. As
    exact as a run: every tensor is read. device: what workers would compute on."""
    there = latest(ready.output, job.metadata.name)
    asked = job.spec.recipe.model_dump(mode="json")
    if there is None or there.document.recipe.get("recipe") != asked or there.document.software != software():
        return None
    if isinstance(job.spec.calibration.source, ModelSamples):
        return None
    log.emit(Doing("comparing with the artifact that is published"))
    source = open_model(ready.root)
    if source_bytes(source) > LARGEST:
        return None
    tokens = read_tokens(job, None, None, ready.texts).within(source.layout.vocabulary)
    tasks = read_documents(job.spec.validation, source.store)
    id = artifact_id(job, source, device, _digests(source), tokens, tasks)
    artifact = Artifact(ready.output, job.metadata.name, id)
    published = artifact.published()
    if published is None:
        return None
    log.add(EventStore(ready.output, job_id(job), log.note))
    log.emit(JobStarted(job.metadata.name, job_id(job), workers))
    log.emit(JobAdmitted(artifact.id))
    repair_pointer(artifact, published.document)
    log.note(f"already published: all {source.layout.blocks} blocks are reused, nothing is left to do")
    log.emit(ArtifactPublished(published.uri, existing=True))
    return published


def _digests(source: ModelSource) -> dict[str, str]:
    """sha256 of every source tensor."""
    worker = Worker("cpu", threads=1)
    try:
        found = [worker.run(Inspect(source.uri, tuple(names))) for names in batches(source)]
    finally:
        worker.close()
    return {name: tensor.sha256 for part in found for name, tensor in part.items()}
