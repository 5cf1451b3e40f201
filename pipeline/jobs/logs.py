"""Reads what the runs of a job have said, from the store alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from counterweight.pipeline.jobs.store import LOGS, JobStore

_SEGMENT = re.compile(rf"{LOGS}/[^/]+/(?P<lease>[0-9]{{4}})/[0-9]{{5}}\.log")


@dataclass(frozen=True, slots=True)
class Line:
    """attempt: number of the lease under which it was said."""

    attempt: int
    text: str


class LogReader:
    """Remembers what it has read, so that it can be asked again for what came since."""

    def __init__(self, jobs: JobStore, id: str) -> None:
        self._jobs, self._id = jobs, id
        self._read: dict[str, int] = {}

    def lines(self) -> Iterator[Line]:
        """Those that were not there at the last call. StorageError."""
        for info in self._jobs.store.list(f"{LOGS}/{self._id}/"):
            match, read = _SEGMENT.fullmatch(info.key), self._read.get(info.key, 0)
            if match is None or info.size <= read:
                continue
            # Segments only grow, and hold whole lines.
            said = self._jobs.store.read_range(info.key, read, info.size - read)
            self._read[info.key] = info.size
            for line in said.decode(errors="replace").splitlines():
                yield Line(int(match["lease"]), line)
