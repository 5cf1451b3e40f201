"""What the artifacts of a batch cost and what they are worth: bits per weight against perplexity and KL, and who is dominated.

Pure, but for `measured`, which reads each artifact's report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from counterweight.pipeline.jobs.batch import Batch
from counterweight.workers.errors import IntegrityError, StorageError
from counterweight.workers.storage import open_store

REPORT = "report/report.json"


@dataclass(frozen=True, slots=True)
class Point:
    """A job of a batch and what its artifact measured: bits per quantized weight, all in; perplexity, and the divergence from
    the original in nats a token. None where nothing was published or measured."""

    job: str
    name: str
    state: str
    settings: Mapping[str, JsonValue]
    artifact: str | None = None
    bits: float | None = None
    perplexity: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A batch in figures. perplexity_front, kl_front: jobs of which no other is at most as large and at most as bad, and better
    in one of the two, by rising bits. original: perplexity of the original model, where it was measured."""

    id: str
    name: str
    state: str
    points: tuple[Point, ...]
    original: float | None
    perplexity_front: tuple[str, ...]
    kl_front: tuple[str, ...]

    def facts(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


def front(points: Sequence[Point], measure: Callable[[Point], float | None]) -> tuple[str, ...]:
    """Jobs that no other dominates in bits and in a measure of which less is better, by rising bits. Of equal ones all stay."""
    known = [(point.bits, value, point.job) for point in points if (value := measure(point)) is not None and point.bits]
    kept = [
        (bits, value, job)
        for bits, value, job in known
        if not any(b <= bits and v <= value and (b < bits or v < value) for b, v, _ in known)
    ]
    return tuple(job for _, _, job in sorted(kept))


def summary(batch: Batch) -> Summary:
    """The figures of all jobs that have published. StorageError when a report cannot be read."""
    found = [measured(batch, index) for index in range(len(batch.jobs))]
    points = tuple(point for point, _ in found)
    originals = {original for _, original in found if original is not None}
    return Summary(
        id=batch.id,
        name=batch.record.name,
        state=batch.state.value,
        points=points,
        original=originals.pop() if len(originals) == 1 else None,
        perplexity_front=front(points, lambda point: point.perplexity),
        kl_front=front(points, lambda point: point.kl),
    )


def measured(batch: Batch, index: int) -> tuple[Point, float | None]:
    """What a job of a batch measured, and the original's perplexity."""
    job, member = batch.jobs[index], batch.record.members[index]
    ended = job.ended
    point = Point(job.id, job.record.name, job.state.value, member.settings)
    if ended is None or ended.artifact is None:
        return point, None
    report = _report(ended.artifact)
    quality, baseline = _mapping(report.get("compensated")), _mapping(report.get("baseline"))
    return (
        Point(
            job.id,
            job.record.name,
            job.state.value,
            member.settings,
            artifact=ended.artifact,
            bits=_number(_mapping(report.get("bits_per_weight")).get("total")),
            perplexity=_number(quality.get("perplexity")),
            kl=_number(quality.get("kl")),
        ),
        _number(baseline.get("perplexity")),
    )


def _report(artifact: str) -> Mapping[str, object]:
    store = open_store(artifact, waits=False)
    try:
        document = json.loads(store.read(REPORT))
    except ValueError as error:
        raise IntegrityError(f"{store.uri_of(REPORT)}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise StorageError(f"{store.uri_of(REPORT)}: expected a report")
    return document


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
