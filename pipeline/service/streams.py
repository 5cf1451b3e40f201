"""Server-sent events: what a job does and says, as it happens, until it is at its end.

Every event that stands in the store has an id, its place there; a client that comes back with `Last-Event-ID`, to whichever
instance, goes on behind it. The last event is called `end`; whoever comes back after that is told that there is nothing more.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Protocol

from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from counterweight.pipeline.event_store import EVENTS
from counterweight.pipeline.jobs.facts import facts
from counterweight.pipeline.jobs.job import Job
from counterweight.pipeline.jobs.logs import LogReader
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.tail import Place, Tail
from counterweight.pipeline.manifest import job_id
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.roots import Roots
from counterweight.workers.errors import SurroundingsError
from counterweight.workers.storage import open_store

LOOK_SECONDS = 1.0
MAX_FRAMES = 1000
"""Of one look: what is read at once stays bounded."""

END = "end"
_KIND = re.compile(r"[a-z_]{1,40}")


class Source(Protocol):
    """What a stream is about."""

    def frames(self) -> Iterator[bytes]:
        """Events that were not given before. SurroundingsError."""


def frame(event: str, data: object, id: str | None = None) -> bytes:
    """An event as it is sent."""
    head = "" if id is None else f"id: {id}\n"
    return f"{head}event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class LogSource:
    """The lines of a job's runs, as `line` with attempt and text."""

    def __init__(self, service: Service, job: Job, behind: Place | None) -> None:
        self._reader = LogReader(service.jobs, job.id, behind)

    def frames(self) -> Iterator[bytes]:
        for line in self._reader.lines():
            yield frame("line", {"attempt": line.attempt, "line": line.text}, str(line.place))


class EventSource:
    """The events of a job's runs, each called by its kind, and its facts, as `state`, whenever its state has changed."""

    def __init__(self, service: Service, job: Job, behind: Place | None) -> None:
        self._jobs, self._id, self._state = service.jobs, job.id, ""
        self._tail = events_of(service.roots, job, behind)

    def frames(self) -> Iterator[bytes]:
        if self._tail is not None:
            for said in self._tail.lines():
                event = event_in(said.line)
                if event is not None:
                    yield frame(str(event["kind"]), event, str(said.place))
        job = self._jobs.get(self._id)
        if job.state.value != self._state:
            self._state = job.state.value
            yield frame("state", facts(job))


def events_of(roots: Roots, job: Job, behind: Place | None = None) -> Tail | None:
    """Where the events of a job's runs grow: in its output, which is opened where it lies below the roots."""
    output = job.record.manifest.spec.output.uri
    if not roots.contains(output):
        return None
    store = open_store(output, waits=False)
    # Jobs of the same manifest share the folder: those that were asked for earlier have written before this one was.
    return Tail(store, f"{EVENTS}/{_folder(job.record)}", behind=behind, since=job.submitted)


def _folder(record: JobRecord) -> str:
    return job_id(record.manifest)


def event_in(line: str) -> dict[str, object] | None:
    """The event that a line holds; None for a line that holds none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    named = isinstance(event, dict) and isinstance(event.get("kind"), str) and _KIND.fullmatch(event["kind"])
    return event if named else None


def place_in(header: str | None) -> Place | None:
    """What `Last-Event-ID` says. 422 for what no stream has sent."""
    if header is None or header == "":
        return None
    place = Place.parse(header)
    if place is None:
        raise Refused(422, "Last-Event-ID", ["header.last-event-id: expected the id of an event of this stream"])
    return place


def streamed(service: Service, name: str, job: Job, source: Source) -> StreamingResponse:
    """The source as a response. name: of the token. 429 for too many at once."""
    if service.throttle.crowded(name):
        raise Refused(429, f"{service.throttle.streams} streams are open: expected no more", (), {"Retry-After": "5"})
    return StreamingResponse(
        _counted(service, name, job.id, source),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _counted(service: Service, name: str, id: str, source: Source) -> AsyncIterator[bytes]:
    with service.throttle.stream(name):
        while True:
            frames, over = await run_in_threadpool(_look, service, id, source)
            for one in frames:
                yield one
            if over:
                return
            if not frames:
                yield b":\n\n"  # a connection that is silent for long is cut by somebody
                await service.pause(LOOK_SECONDS)


def _look(service: Service, id: str, source: Source) -> tuple[list[bytes], bool]:
    """What there is now, and whether that was all there will be. A store that is away is asked again."""
    try:
        ended = service.jobs.get(id).state.terminal  # before reading: what is said until the end is given
        frames = list(islice(source.frames(), MAX_FRAMES))
        if not ended or len(frames) == MAX_FRAMES:
            return frames, False
        return [*frames, frame(END, facts(service.jobs.get(id)), END)], True
    except SurroundingsError:
        return [], False
