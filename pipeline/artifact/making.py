"""What a report says of how an artifact was made: on what machine, by what command, which task ran when, what was before it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from counterweight.pipeline.events import Event, TaskFinished
from counterweight.pipeline.redaction import redacted
from counterweight.workers.config import Config

MAX_SPANS = 4000
"""Tasks of a timeline: more than anybody can tell apart on a screen."""


class Sizes(Config):
    """Bytes of the source's tensors and of all of the artifact's files but its report."""

    source: int
    artifact: int


class Host(Config):
    """The machine that drove the job; its name is nobody's business. memory: in bytes."""

    processor: str
    cores: int
    memory: int
    system: str
    python: str


class Span(Config):
    """A task on a worker. start: seconds since the first task of this run began."""

    task: str
    kind: str
    worker: int
    start: float
    seconds: float


class Making(Config):
    """The run that published the artifact; tasks that earlier runs had finished are none of its spans. workers: how many there
    were."""

    command: str
    host: Host
    workers: int
    spans: tuple[Span, ...] = ()
    left_out: int = 0
    """Spans behind the first `MAX_SPANS`."""

    @property
    def seconds(self) -> float:
        """From the first task's beginning to the last one's end."""
        return max((span.start + span.seconds for span in self.spans), default=0.0)

    @property
    def utilisation(self) -> float | None:
        """Share of the workers' time in which they had a task; None without any."""
        every = self.seconds * self.workers
        return sum(span.seconds for span in self.spans) / every if every else None


class Earlier(Config):
    """The artifact of the same name that was published last before. qualities: variant -> metric -> number."""

    id: str
    created: str
    bits: float
    qualities: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    recipe: Mapping[str, object]


class Timeline:
    """A reader of events that keeps when each task ran on which worker."""

    def __init__(self) -> None:
        self._found: list[tuple[float, TaskFinished]] = []

    def on(self, event: Event) -> None:
        if isinstance(event, TaskFinished):
            self._found.append((event.time - event.seconds, event))

    def end(self) -> None:
        """Nothing is kept open."""

    def making(self, workers: int) -> Making:
        """What was seen until now."""
        found = sorted(self._found, key=lambda pair: pair[0])
        began = found[0][0] if found else 0.0
        spans = tuple(
            Span(task=event.task, kind=event.task_kind, worker=event.worker, start=start - began, seconds=event.seconds)
            for start, event in found[:MAX_SPANS]
        )
        left_out = max(0, len(found) - MAX_SPANS)
        return Making(command=command_line(sys.argv), host=this_host(), workers=workers, spans=spans, left_out=left_out)


def command_line(arguments: Sequence[str]) -> str:
    """A process's arguments as they might be typed, without credentials and without where the program lies."""
    program, *rest = arguments or [""]
    return redacted(shlex.join([Path(program).name or "python", *rest]))


def this_host() -> Host:
    """The machine that this runs on."""
    return Host(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _processor() -> str:
    """Its name as Linux has it, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()
