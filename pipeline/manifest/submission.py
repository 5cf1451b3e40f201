"""What may be submitted: one job, or a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, JsonValue

from counterweight.pipeline.manifest.batch import (
    CompressionBatch,
    Settings,
    combinations,
    name_under,
    overrides,
    same_name,
)
from counterweight.pipeline.manifest.job import CompressionJob
from counterweight.pipeline.manifest.load import (
    BATCH,
    load_manifest,
    parse_document,
    parse_manifest,
    read_manifest,
    validated,
)
from counterweight.pipeline.manifest.overrides import apply_overrides
from counterweight.pipeline.manifest.problems import problem, show
from counterweight.pipeline.manifest.schema import batch_schema
from counterweight.pipeline.manifest.uris import resolve_uri
from counterweight.workers.config import Config
from counterweight.workers.errors import ManifestError, RequestError


class SubmittedJob(Config):
    """A job, and under which settings of its batch it was made."""

    job: CompressionJob
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Submission:
    """batch: None for a manifest of one job."""

    jobs: tuple[SubmittedJob, ...]
    batch: CompressionBatch | None


def load_submission(location: str, changes: Sequence[str] = (), output: str | None = None) -> Submission:
    """The manifest at `location` and all jobs that it asks for. changes: `path=value` each, to the manifest itself. output: in
    the place of `spec.output.uri` of every job. ManifestError with a line for each problem, StorageError."""
    data, base = read_manifest(location)
    document = parse_document(data, location)
    each = [] if output is None else overrides({"spec.output.uri": output})
    if document.get("kind") != BATCH:
        job = parse_manifest(data, name=location, base=base, overrides=[*changes, *each]).job
        return Submission((SubmittedJob(job=job),), None)
    changed = apply_overrides(document, changes)
    batch = validated(CompressionBatch, document, changed, batch_schema())
    jobs = tuple(
        _job(batch, index, base, settings, each)
        for index in range(len(batch.spec.jobs))
        for settings in combinations(batch.spec)
    )
    if (name := same_name([submitted.job.metadata.name for submitted in jobs])) is not None:
        raise problem(("spec",), f"two jobs are called {show(name)}: expected metadata.name among what differs")
    return Submission(jobs, batch)


def _job(batch: CompressionBatch, index: int, base: str, settings: Settings, each: Sequence[str]) -> SubmittedJob:
    uri = batch.spec.jobs[index]
    try:
        location = resolve_uri(uri, base)
    except RequestError as error:
        raise problem(("spec", "jobs", index), f"{show(uri)}: {error}") from error
    try:
        job = load_manifest(location, [*overrides(settings), *each]).job
    except ManifestError as error:
        raise ManifestError("\n".join(f"spec.jobs.{index}: {line}" for line in str(error).splitlines())) from error
    name = name_under(job.metadata.name, settings)
    renamed = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": name})})
    return SubmittedJob(job=renamed, settings=settings)
