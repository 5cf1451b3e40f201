"""What a job's page shows beside its facts: how far its last run is, and what it said last."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.logs import LogReader
from counterweight.pipeline.service.artifacts import ID, NAME
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.streams import event_in, events_of

TAIL_LINES = 100


@dataclass
class Progress:
    """Of the last run. blocks, done: of the model; 0 until they are known. stages: name, when it was entered, seconds until the
    next one, None for the last. tasks, retries: that were finished, and that were tried again."""

    blocks: int = 0
    done: int = 0
    stages: list[tuple[str, str, float | None]] = field(default_factory=list)
    tasks: int = 0
    retries: int = 0


def progress_of(service: Service, job: Job) -> Progress | None:
    """None where its events are not to be read. StorageError."""
    tail = events_of(service.roots, job)
    if tail is None:
        return None
    events: list[Mapping[str, object]] = []
    for said in tail.lines():
        event = event_in(said.line)
        if event is not None and event["kind"] == "job_started":
            events.clear()
        if event is not None:
            events.append(event)
    return fold(events)


def fold(events: Iterable[Mapping[str, object]]) -> Progress:
    """The progress that a run's events tell."""
    progress, entered = Progress(), list[tuple[str, float]]()
    for event in events:
        match event:
            case {"kind": "planned", "blocks": int(blocks)}:
                progress.blocks = blocks
            case {"kind": "block_done"}:
                progress.done += 1
            case {"kind": "task_finished"}:
                progress.tasks += 1
            case {"kind": "task_retried"}:
                progress.retries += 1
            case {"kind": "stage_entered", "stage": str(stage), "time": float(at) | int(at)}:
                entered.append((stage, float(at)))
            case {"kind": "artifact_published" | "job_failed" as kind, "time": float(at) | int(at)}:
                entered.append((kind.replace("_", " "), float(at)))
    ends = [at for _, at in entered[1:]]
    for index, (stage, at) in enumerate(entered):
        seconds = ends[index] - at if index < len(ends) else None
        progress.stages.append((stage, _moment(at), seconds))
    return progress


def _moment(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return "?"


def last_lines(service: Service, job: Job) -> list[str]:
    """Of its log. StorageError."""
    return [line.text for line in deque(LogReader(service.jobs, job.id).lines(), TAIL_LINES)]


def artifact_path(service: Service, job: Job) -> str | None:
    """`name/id` of what it published, where the service may open it."""
    uri = None if job.ended is None else job.ended.artifact
    if uri is None or not service.roots.contains(uri):
        return None
    name, _, id = "/".join(uri.split("/")[-2:]).partition("/")
    return f"{name}/{id}" if _is(NAME, name) and _is(ID, id) else None


def _is(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None
