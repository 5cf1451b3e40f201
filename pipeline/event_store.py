"""A job's events in the object store, for whoever is not at the terminal.

    _work/events/<job id>/<run>/00001.jsonl    one JSON object a line: kind, time, and the event's fields

An object store cannot append. The last segment is therefore written whole again, every few seconds and at the end of a stage,
until it is full and the next one begins; so there are few objects however long a job runs. Every run of a job has a folder
of its own, so that two at once do not meet.

A request that is refused leaves nothing in its output: events are written from `JobAdmitted` on, those before it then too.

Writing happens on a thread of its own. It never fails the job and never holds it up, at its end for `END_SECONDS` at most:
what could not be written is noted once and tried again with the next events.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

from counterweight.pipeline.events import ArtifactPublished, Event, JobAdmitted, JobFailed, StageEntered
from counterweight.workers.errors import CounterweightError
from counterweight.workers.storage import ObjectStore
from counterweight.workers.workspace import WORK

EVENTS = f"{WORK}/events"

SEGMENT_BYTES = 64 << 10
MAX_SEGMENTS = 256
"""Bounds of what one run writes: 16 MiB, some hundred thousand events. Of what comes later only stages and the end are."""

FLUSH_SECONDS = 5.0
END_SECONDS = 10.0

_SECRETS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE), r"\1***@"),
    (
        re.compile(
            r"([?&](?:[\w-]*(?:token|signature|secret|password|credential|key|keyid|sig))=)[^&\s'\"]+", re.IGNORECASE
        ),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "***"),
)


def redacted(text: str) -> str:
    """The text without the credentials that URIs and messages of libraries may hold."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


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
        self._store, self._note, self._seconds, self._patience = store, note, seconds, patience
        self._lock = threading.Lock()
        self._segments: list[bytearray] = [bytearray()]
        self._unwritten: set[int] = set()
        self._writes = False
        self._problem: str | None = None
        self._noted = False
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def on(self, event: Event) -> None:
        """Takes in an event; it is written soon."""
        line = line_of(event)
        milestone = isinstance(event, StageEntered | ArtifactPublished | JobFailed)
        with self._lock:
            full = bool(self._segments[-1]) and len(self._segments[-1]) + len(line) > SEGMENT_BYTES
            if full and len(self._segments) < MAX_SEGMENTS:
                self._segments.append(bytearray())
                full = False
            if milestone or not full:
                self._segments[-1] += line
                self._unwritten.add(len(self._segments) - 1)
        if isinstance(event, JobAdmitted) or (isinstance(event, JobFailed) and not event.refused):
            self._writes = True
        if milestone:
            self._wake.set()
        self._tell()

    def end(self) -> None:
        """Writes what is left, within the patience."""
        self._ended = True
        self._wake.set()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._problem = self._problem or f"the store took longer than {self._patience:g} s"
        self._tell()

    def _tell(self) -> None:
        """Once, because the job may have thousands of events and the store be away for all of them."""
        if self._problem is not None and not self._noted:
            self._noted = True
            self._note(f"events of the job could not be stored: {self._problem}")

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(self._seconds)
            self._wake.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        if not self._writes:
            return
        with self._lock:
            waiting = {index: bytes(self._segments[index]) for index in self._unwritten}
            self._unwritten.clear()
        for index, data in sorted(waiting.items()):
            try:
                self._store.write(f"{self.prefix}/{index + 1:05}.jsonl", data)
            except CounterweightError as error:
                self._problem = redacted(str(error))
                with self._lock:
                    self._unwritten.add(index)
