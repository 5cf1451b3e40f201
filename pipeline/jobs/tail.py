"""Follows texts that grow in an object store (`pipeline.segments`), line by line, and can go on where it stopped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from counterweight.workers.storage import ObjectStore

_SEGMENT = re.compile(r"(?P<text>[^/]+)/(?P<segment>[0-9]{5})\.[a-z]+")
_PLACE = re.compile(r"(?P<text>[0-9A-Za-z-]{1,40})/(?P<segment>[0-9]{5})/(?P<offset>[0-9]{1,9})")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Behind a line: which text, by its name, which segment of it, and how many bytes of that."""

    text: str
    segment: str
    offset: int

    def __str__(self) -> str:
        return f"{self.text}/{self.segment}/{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Place | None:
        """The place that `str` wrote; None for anything else."""
        match = _PLACE.fullmatch(text)
        return None if match is None else cls(match["text"], match["segment"], int(match["offset"]))


@dataclass(frozen=True, slots=True)
class Said:
    """A line, without its end. place: behind it."""

    place: Place
    line: str


class Tail:
    """The lines of all texts `<prefix>/<text>/00001.<suffix>`, ordered by the texts' names, each line once.

    behind: what is up to there was read before. Where two texts grow at once, lines of the earlier one that come after it are
    not given again. since: texts' segments that were written last before it are left out.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, *, behind: Place | None = None, since: datetime | None = None
    ) -> None:
        self._store, self._prefix, self._behind, self._since = store, f"{prefix}/", behind, since
        self._read: dict[str, int] = {}

    def lines(self) -> Iterator[Said]:
        """Those that were not given before; it may be left in the middle and asked again. StorageError."""
        for info in self._store.list(self._prefix):
            match = _SEGMENT.fullmatch(info.key.removeprefix(self._prefix))
            if match is None or (self._since is not None and info.modified < self._since):
                continue
            text, segment = match["text"], match["segment"]
            start = self._read.setdefault(info.key, self._start(text, segment, info.size))
            if info.size <= start:
                continue
            # Segments only grow, and hold whole lines.
            for line in self._store.read_range(info.key, start, info.size - start).splitlines(keepends=True):
                self._read[info.key] += len(line)
                place = Place(text, segment, self._read[info.key])
                yield Said(place, line.decode(errors="replace").rstrip("\r\n"))

    def _start(self, text: str, segment: str, size: int) -> int:
        behind = self._behind
        if behind is None or (text, segment) > (behind.text, behind.segment):
            return 0
        return behind.offset if (text, segment) == (behind.text, behind.segment) else size
