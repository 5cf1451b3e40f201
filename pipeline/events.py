"""What happens to a job, as values. The display, the log in the store and whoever comes later are readers of them.

Nothing that takes time is imported here: the command shows a display before anything else is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Protocol, Self

from counterweight.workers.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """time: seconds since 1970, when it happened."""

    kind: ClassVar[str]

    time: float = field(default_factory=time.time, compare=False)


@dataclass(frozen=True, slots=True)
class JobStarted(Event):
    """A job begins, on so many workers. id: of the job, not of its artifact."""

    kind: ClassVar[str] = "job_started"

    name: str
    id: str
    workers: int


@dataclass(frozen=True, slots=True)
class JobAdmitted(Event):
    """Manifest, texts and model have been looked at and nothing in them is wrong: work begins. artifact: the id of what it will
    be."""

    kind: ClassVar[str] = "job_admitted"

    artifact: str


@dataclass(frozen=True, slots=True)
class Doing(Event):
    """What takes time now, before there are stages: Ray starts, libraries are loaded."""

    kind: ClassVar[str] = "doing"

    text: str


@dataclass(frozen=True, slots=True)
class Expected(Event):
    """How long the job takes as its plan says, before anything of it is measured. stages: name -> seconds, in order; `start` is
    the time until workers answer."""

    kind: ClassVar[str] = "expected"

    stages: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StageEntered(Event):
    """The job enters a stage: inventory, blocks, assemble, validate, publish."""

    kind: ClassVar[str] = "stage_entered"

    stage: str


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """The model has `blocks` blocks, of which `reused` were finished before; `BlockDone` follows for those too. behind: what
    follows the blocks, by its arithmetic, as a multiple of all blocks'."""

    kind: ClassVar[str] = "planned"

    blocks: int
    reused: int
    behind: float = 0.0


@dataclass(frozen=True, slots=True)
class TaskStarted(Event):
    """A worker takes up a task. block: the transformer block that it works on, None for none."""

    kind: ClassVar[str] = "task_started"

    task: str
    task_kind: str
    worker: int
    block: int | None = None


@dataclass(frozen=True, slots=True)
class TaskFinished(Event):
    """A task gave back its value, `seconds` after it was started. read_bytes, written_bytes: what passed between its worker and
    stores meanwhile."""

    kind: ClassVar[str] = "task_finished"

    task: str
    task_kind: str
    worker: int
    seconds: float
    block: int | None = None
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TaskRetried(Event):
    """A task failed and is tried again. tries: how often it has been tried, of at most `attempts`."""

    kind: ClassVar[str] = "task_retried"

    task: str
    worker: int
    tries: int
    attempts: int
    cause: str
    worker_died: bool

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.task}: try {self.tries} of {self.attempts} failed: {self.cause}"


@dataclass(frozen=True, slots=True)
class BlockDone(Event):
    """A block is finished. seconds and peak_bytes: of its task. error_*: its modules' mean relative output error before and
    after the low-rank branch, None when no token reached one. reused: an earlier job made it."""

    kind: ClassVar[str] = "block_done"

    block: int
    seconds: float
    peak_bytes: int
    error_quantized: float | None
    error_compensated: float | None
    reused: bool


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """A departure from the recipe that was necessary, with its cause."""

    kind: ClassVar[str] = "fell_back"

    module: str
    step: str
    cause: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.module}: {self.step}: {self.cause}"


@dataclass(frozen=True, slots=True)
class WindowsDone(Event):
    """`done` of `total` parts of the validation are finished."""

    kind: ClassVar[str] = "windows_done"

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Note(Event):
    """Something that the user should see."""

    kind: ClassVar[str] = "note"

    text: str


@dataclass(frozen=True, slots=True)
class ArtifactPublished(Event):
    """The artifact is visible. existing: it was before."""

    kind: ClassVar[str] = "artifact_published"

    uri: str
    existing: bool


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """The job ended without an artifact. error: the class of what ended it. refused: whether the request is wrong."""

    kind: ClassVar[str] = "job_failed"

    error: str
    text: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Summary(Event):
    """The job is done; lines: label and value of each line of the summary."""

    kind: ClassVar[str] = "summary"

    lines: Sequence[tuple[str, str]]


class Reader(Protocol):
    """Who is told of events, in the order in which they happen, on the thread that drives the job."""

    def on(self, event: Event) -> None:
        """Takes in an event."""

    def end(self) -> None:
        """There will be no further event."""


class EventLog:
    """Tells every event of a job to its readers. A context manager: an error that leaves it is the job's last event."""

    def __init__(self, *readers: Reader) -> None:
        self._readers = list(readers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.emit(JobFailed(type(error).__name__, str(error), isinstance(error, RequestError)))
        for reader in list(self._readers):
            reader.end()

    def add(self, reader: Reader) -> None:
        """A further reader, from now on."""
        self._readers.append(reader)

    def emit(self, event: Event) -> None:
        """Tells everyone."""
        for reader in list(self._readers):
            reader.on(event)

    def note(self, text: str) -> None:
        """Tells everyone something that the user should see."""
        self.emit(Note(text))
