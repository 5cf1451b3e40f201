"""Published artifacts: found through the jobs that published them, read where they lie below the roots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from counterweight.pipeline.artifact.document import DOCUMENT, ArtifactDocument, FileEntry
from counterweight.pipeline.artifact.reader import read_document
from counterweight.pipeline.service.access import visible_jobs
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.tokens import Principal
from counterweight.workers.errors import ObjectNotFoundError, UnknownIdError
from counterweight.workers.storage import ObjectStore, open_store

NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
ID = r"[0-9a-f]{16}"
LATEST = "latest"

_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,15})-(?P<last>[0-9]{0,15})")


@dataclass(frozen=True, slots=True)
class Found:
    """An artifact that is there for whoever asks."""

    store: ObjectStore
    document: ArtifactDocument

    @property
    def files(self) -> Mapping[str, FileEntry | None]:
        """All of its files; of artifact.json, which names the others, there is no entry."""
        return {**self.document.files, DOCUMENT: None}

    def size(self, path: str) -> int:
        """Bytes of a file. UnknownIdError for what is none of its files."""
        if path not in self.files:
            raise UnknownIdError(path)
        entry = self.files[path]
        return self.store.size(path) if entry is None else entry.size


def find_artifact(service: Service, principal: Principal, name: str, id: str) -> Found:
    """The artifact of that name and id, which a job published that the principal sees. id: or `latest`. UnknownIdError."""
    pattern = re.compile(rf"/{re.escape(name)}/{ID if id == LATEST else re.escape(id)}\Z")
    published = [
        (job.journal[-1].at, job.ended.artifact)
        for job in visible_jobs(service, principal)
        if job.ended is not None and job.ended.artifact is not None
    ]
    for _, uri in sorted(published, reverse=True):
        if pattern.search(uri) and service.roots.contains(uri):
            store = open_store(uri, waits=False)
            try:
                return Found(store, read_document(store))
            except ObjectNotFoundError:  # removed since
                continue
    raise UnknownIdError(f"{name}/{id}")


def span(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the one behind the last that a Range header asks for (RFC 9110, 14.2); None: all of them, as for
    several ranges at once, which a server may leave aside. 416 for one that begins behind the end."""
    match = None if header is None else _RANGE.fullmatch(header)
    if match is None or not (match["first"] or match["last"]):
        return None
    if not match["first"]:
        start, stop = max(size - int(match["last"]), 0), size
    else:
        start, stop = int(match["first"]), min(int(match["last"] or size) + 1, size)
        if match["last"] and int(match["last"]) < start:
            return None
    if start >= size or start >= stop:
        raise Refused(416, f"a range of a file of {size} bytes", (), {"Content-Range": f"bytes */{size}"})
    return start, stop


def pieces(store: ObjectStore, path: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes [start, stop) of a file."""
    left = stop - start
    for piece in store.stream(path, start=start):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return
