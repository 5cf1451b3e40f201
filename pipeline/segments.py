"""A growing text in the object store: events of a run, the log of a job.

    <prefix>/00001.jsonl, <prefix>/00002.jsonl, ...

An object store cannot append. The last segment is therefore written whole again, every few seconds, until it is full and the
next one begins; so there are few objects however long the text grows.

Writing happens on a thread of its own. It never fails its job and never holds it up, at its end for a given patience at most:
what could not be written is noted once and tried again with the next lines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from counterweight.pipeline.redaction import redacted
from counterweight.workers.errors import CounterweightError
from counterweight.workers.storage import ObjectStore

SEGMENT_BYTES = 64 << 10
MAX_SEGMENTS = 256
"""Bounds of one text: 16 MiB, some hundred thousand lines. Of what comes later only lines that matter are kept."""

FLUSH_SECONDS = 5.0
END_SECONDS = 10.0


class SegmentWriter:
    """Keeps lines below `prefix` of a store. what: the lines, for messages. note: called, on the caller's thread, with what
    went wrong. seconds: between two looks of the writing thread. patience: seconds that the end may take."""

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        what: str,
        note: Callable[[str], None],
        *,
        suffix: str = "jsonl",
        seconds: float = FLUSH_SECONDS,
        patience: float = END_SECONDS,
    ) -> None:
        self.prefix = prefix
        self._store, self._what, self._note, self._suffix = store, what, note, suffix
        self._seconds, self._patience = seconds, patience
        self._lock = threading.Lock()
        self._segments: list[bytearray] = [bytearray()]
        self._unwritten: set[int] = set()
        self._writes = False
        self._problem: str | None = None
        self._noted = False
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """From now on lines are written; those before are only kept."""
        self._writes = True

    def append(self, line: bytes, *, matters: bool = False) -> None:
        """Takes in a line. matters: it is kept where the text is full, and written at once."""
        with self._lock:
            full = bool(self._segments[-1]) and len(self._segments[-1]) + len(line) > SEGMENT_BYTES
            if full and len(self._segments) < MAX_SEGMENTS:
                self._segments.append(bytearray())
                full = False
            if matters or not full:
                self._segments[-1] += line
                self._unwritten.add(len(self._segments) - 1)
        if matters:
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
        """Once, because there may be thousands of lines and the store be away for all of them."""
        if self._problem is not None and not self._noted:
            self._noted = True
            self._note(f"{self._what} could not be stored: {self._problem}")

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
                self._store.write(f"{self.prefix}/{index + 1:05}.{self._suffix}", data)
            except CounterweightError as error:
                self._problem = redacted(str(error))
                with self._lock:
                    self._unwritten.add(index)
