"""A pool whose workers are objects of this process, and whole jobs on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counterweight.pipeline.artifact import Published
from counterweight.pipeline.events import BlockDone, Event, EventLog, FellBack, Note, StageEntered, TaskRetried
from counterweight.pipeline.manifest import CompressionJob, parse_manifest
from counterweight.pipeline.opening import open_job
from counterweight.pipeline.orchestrator import Orchestrator
from counterweight.pipeline.passing import References
from counterweight.pipeline.pool import Outcome
from counterweight.pipeline.progress import Progress
from counterweight.workers.errors import CounterweightError
from counterweight.workers.held_blocks import HOLD_BYTES
from counterweight.workers.tasks.task import Task
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob
from tests.common_memory import Member, Shard
from tests.models import write_text


class InProcessPool:
    """`pipeline.pool.WorkerPool` without processes: a task runs when it is submitted.

    Errors that are raised on purpose become outcomes, as they do under Ray; any other error is a defect and leaves here.
    """

    def __init__(self, workers: int = 1, threads: int = 1, hold_bytes: int = HOLD_BYTES) -> None:
        self.size, self.threads = workers, threads
        self.room: int | None = None
        self.calls: list[tuple[int, str]] = []
        self._members = [Member(Worker("cpu", threads, hold_bytes), shares=workers > 1) for _ in range(workers)]
        self._references: References[Shard] = References()
        self._finished: list[Outcome] = []
        self._unread: list[Blob] = []
        self._waits, self._since = 0, dict.fromkeys(range(workers), 0)

    def idle(self) -> list[int]:
        busy = [outcome.worker for outcome in self._finished]
        return sorted(set(range(self.size)) - set(busy), key=lambda worker: self._since[worker])

    def submit(self, worker: int, task: Task[object]) -> int:
        self.calls.append((worker, task.kind))
        ticket = len(self.calls)
        try:
            given = self._references.given(worker, task)
            value, made = self._members[worker].run(task, self._unread, given)
            self._references.add(worker, made)
            self._unread = []
            self._finished.append(Outcome(ticket, worker, value=value))
        except CounterweightError as error:
            self._finished.append(Outcome(ticket, worker, error=error))
        return ticket

    def wait(self, seconds: float) -> list[Outcome]:
        finished, self._finished = self._finished, []
        self._waits += 1
        self._since |= {outcome.worker: self._waits for outcome in finished}
        return finished

    def forget(self, unread: Sequence[Blob]) -> None:
        self._unread += unread
        self._references.forget(unread)

    def close(self) -> None:
        for member in self._members:
            member.worker.close()


@dataclass
class RecordedProgress(Progress):
    """Shows nothing; keeps what it was told."""

    stages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: list[tuple[int, bool]] = field(default_factory=list)

    def on(self, event: Event) -> None:
        match event:
            case StageEntered(stage):
                self.stages.append(stage)
            case BlockDone(block=block, reused=reused):
                self.done.append((block, reused))
            case Note(text) | TaskRetried(text=text) | FellBack(text=text):
                self.notes.append(text)


def run_job(
    model: Path,
    output: Path,
    recipe: Mapping[str, Any],
    *,
    calibration: Mapping[str, Any] | None = None,
    validation: Mapping[str, Any] | None = None,
    distillation: Mapping[str, Any] | None = None,
    workers: int = 1,
    threads: int = 1,
    hold_bytes: int = HOLD_BYTES,
    progress: Progress | None = None,
    pool: InProcessPool | None = None,
    name: str = "tiny",
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> Published:
    """Compresses the checkpoint in `model`, made by `tests.models`; artifacts go below `output`.

    calibration, validation: what is not the default of these tests; no validation: published unjudged. distillation: as the
    manifest has it. pool: in the place of one of `workers` with `threads` each. beside: name -> recipe of jobs that are
    compressed beside this one.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = write_text(output / "text.txt", 20_000).as_uri()
    spec: dict[str, Any] = {
        "model": {"uri": model.as_uri()},
        "calibration": {"source": {"uri": text}, "sequences": 8, "sequence_length": 32, **(calibration or {})},
        "output": {"uri": (output / "artifacts").as_uri()},
    }
    if pool is not None and pool.size > 1:
        spec["resources"] = {"workers": pool.size}
    if validation is not None:
        spec["validation"] = {"text": {"uri": text}, "windows": 8, **validation}
    if distillation is not None:
        spec["distillation"] = distillation

    def job_of(name: str, recipe: Mapping[str, Any]) -> CompressionJob:
        document: dict[str, Any] = {
            "apiVersion": "counterweight/v1",
            "kind": "CompressionJob",
            "metadata": {"name": name},
        }
        document["spec"] = {**spec, "recipe": dict(recipe)}
        return parse_manifest(json.dumps(document), name="tiny.json", base=output.as_uri()).job

    job = job_of(name, recipe)
    others = [job_of(*one) for one in (beside or {}).items()]
    pool = InProcessPool(workers, threads, hold_bytes) if pool is None else pool
    return run_manifest(job, pool, progress or RecordedProgress(), others)


def run_manifest(
    job: CompressionJob, pool: InProcessPool, progress: Progress, beside: Sequence[CompressionJob] = ()
) -> Published:
    """A job on a pool, which is closed then."""
    try:
        with EventLog(progress) as log:
            opened = open_job(job, pool, log, here=True)
            return Orchestrator(job, opened, pool, "cpu", log, beside=beside).run()
    finally:
        pool.close()


def local(published: Published) -> Path:
    """The artifact's directory."""
    return Path(published.uri.removeprefix("file://"))
