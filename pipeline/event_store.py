"""A job's events in the object store, for whoever is not at the terminal.

    _work/events/<job id>/<run>/00001.jsonl    one JSON object a line: kind, time, and the event's fields

Every run of a job has a folder of its own, so that two at once do not meet. How an object store is appended to is told in
`pipeline.segments`: the end of a stage is written at once, and storing never fails the job.

A request that is refused leaves nothing in its output: events are written from `JobAdmitted` on, those before it then too.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict

from counterweight.pipeline.events import ArtifactPublished, Event, JobAdmitted, JobFailed, StageEntered
from counterweight.pipeline.redaction import redacted
from counterweight.pipeline.segments import END_SECONDS, FLUSH_SECONDS, SegmentWriter
from counterweight.workers.storage import ObjectStore
from counterweight.workers.workspace import WORK

EVENTS = f"{WORK}/events"


def line_of(event: Event) -> bytes:
    """The event as a line of JSON, without credentials."""
    fields = {"kind": event.kind, **asdict(event)}
    return (json.dumps(_without_credentials(fields), ensure_ascii=False) + "\n").encode()


def _without_credentials(value: object) -> object:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: _without_credentials(part) for name, part in value.items()}
    return [_without_credentials(part) for part in value] if isinstance(value, list | tuple) else value


class EventStore:
    """A reader that keeps events below `store`. job: its id. note: called, on the job's thread, with what went wrong.
    seconds: between two looks of the writing thread. patience: seconds that the end may take."""

    def __init__(
        self,
        store: ObjectStore,
        job: str,
        note: Callable[[str], None],
        *,
        seconds: float = FLUSH_SECONDS,
        patience: float = END_SECONDS,
    ) -> None:
        run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
        self.prefix = f"{EVENTS}/{job}/{run}"
        self._segments = SegmentWriter(
            store, self.prefix, "events of the job", note, seconds=seconds, patience=patience
        )

    def on(self, event: Event) -> None:
        """Takes in an event; it is written soon."""
        if isinstance(event, JobAdmitted) or (isinstance(event, JobFailed) and not event.refused):
            self._segments.begin()
        milestone = isinstance(event, StageEntered | ArtifactPublished | JobFailed)
        self._segments.append(line_of(event), matters=milestone)

    def end(self) -> None:
        """Writes what is left, within the patience."""
        self._segments.end()
