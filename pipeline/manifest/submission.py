"""What may be submitted: one job, or a batch of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
from counterweight.pipeline.manifest.uris import resolve_uri
from counterweight.workers.config import Config
from counterweight.workers.errors import ManifestError, RequestError

MAX_WORK = 8 << 20
"""Jobs of a bundle times its bytes: each job's manifest is read anew, which takes about a second for so much."""


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
    batch = validated(CompressionBatch, document, changed)
    return _submission(batch, partial(_read, base=base), each)


def parse_bundle(data: bytes | str, name: str) -> Submission:
    """A batch that comes with its manifests, because nobody is there who would read them: a mapping with `batch`, a
    CompressionBatch, and `manifests`, in which each of its `spec.jobs` is the key of a CompressionJob with absolute URIs.
    ManifestError with a line for each problem."""
    document = parse_document(data, name)
    batch, manifests = document.get("batch"), document.get("manifests")
    if set(document) != {"batch", "manifests"} or not isinstance(batch, dict) or not isinstance(manifests, dict):
        raise problem((), "expected a mapping with batch and manifests, both of them mappings")

    def find(uri: str, changes: Sequence[str]) -> CompressionJob:
        if uri not in manifests:
            raise RequestError("expected a key of manifests")
        return parse_manifest(json.dumps(manifests[uri]), name="manifest.json", base=None, overrides=changes).job

    wanted = validated(CompressionBatch, batch, [])
    count = len(wanted.spec.jobs) * len(combinations(wanted.spec))
    if count * len(data) > MAX_WORK:
        raise problem(("batch", "spec"), f"{count} jobs in {len(data)} bytes: expected at most {MAX_WORK} as a product")
    return _submission(wanted, find, [])


Find = Callable[[str, Sequence[str]], CompressionJob]
"""The job that a batch names, under overrides. ManifestError for what describes none, RequestError for what is not there."""


def _submission(batch: CompressionBatch, find: Find, each: Sequence[str]) -> Submission:
    jobs = tuple(
        _job(batch, index, find, settings, each)
        for index in range(len(batch.spec.jobs))
        for settings in combinations(batch.spec)
    )
    if (name := same_name([submitted.job.metadata.name for submitted in jobs])) is not None:
        raise problem(("spec",), f"two jobs are called {show(name)}: expected metadata.name among what differs")
    return Submission(jobs, batch)


def _read(uri: str, changes: Sequence[str], *, base: str) -> CompressionJob:
    return load_manifest(resolve_uri(uri, base), changes).job


def _job(batch: CompressionBatch, index: int, find: Find, settings: Settings, each: Sequence[str]) -> SubmittedJob:
    uri = batch.spec.jobs[index]
    try:
        job = find(uri, [*overrides(settings), *each])
    except ManifestError as error:
        raise ManifestError("\n".join(f"spec.jobs.{index}: {line}" for line in str(error).splitlines())) from error
    except RequestError as error:
        raise problem(("spec", "jobs", index), f"{show(uri)}: {error}") from error
    name = name_under(job.metadata.name, settings)
    renamed = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": name})})
    return SubmittedJob(job=renamed, settings=settings)
