"""Reads what the runs of a job have said, from the store alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from counterweight.pipeline.jobs.store import LOGS, JobStore
from counterweight.pipeline.jobs.tail import Place, Tail


@dataclass(frozen=True, slots=True)
class Line:
    """attempt: number of the lease under which it was said. place: behind it."""

    attempt: int
    text: str
    place: Place


class LogReader:
    """Remembers what it has read, so that it can be asked again for what came since. behind: what was read elsewhere."""

    def __init__(self, jobs: JobStore, id: str, behind: Place | None = None) -> None:
        self._tail = Tail(jobs.store, f"{LOGS}/{id}", behind=behind)

    def lines(self) -> Iterator[Line]:
        """Those that were not there at the last call. StorageError."""
        for said in self._tail.lines():
            if said.place.text.isdecimal():
                yield Line(int(said.place.text), said.line, said.place)
