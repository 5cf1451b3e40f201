"""Published artifacts: found through the jobs that published them, read where they lie below the roots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from counterweight.pipeline.artifact.document import DOCUMENT, ArtifactDocument, FileEntry
from counterweight.pipeline.artifact.reader import read_document
from counterweight.pipeline.artifact.tags import ARTIFACT_ID, tagged, tags
from counterweight.pipeline.service.access import visible_jobs
from counterweight.pipeline.service.context import Service
from counterweight.pipeline.service.problems import Refused
from counterweight.pipeline.service.tokens import Principal
from counterweight.workers.errors import ObjectNotFoundError, UnknownIdError
from counterweight.workers.storage import ObjectStore, open_store

NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
ID = ARTIFACT_ID
LATEST = "latest"

_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,15})-(?P<last>[0-9]{0,15})")


@dataclass(frozen=True, slots=True)
class Found:
    """An artifact that is there for whoever asks. names: where its name's artifacts and tags lie."""

    store: ObjectStore
    document: ArtifactDocument
    names: ObjectStore

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
    """The artifact of that name and id, which a job published that the principal sees. id: or `latest`, or a tag.
    UnknownIdError."""
    known = published(service, principal, name)
    whole = re.fullmatch(ID, id) is not None
    tag = None if whole or id == LATEST else id
    on = {root: tagged(open_store(root, waits=False), tag) for root in known} if tag is not None else {}
    places = [(at, root, one) for root, found in known.items() for at, one in found]
    for _, root, one in sorted(places, reverse=True):
        if id == LATEST or one == (id if tag is None else on[root]):
            names = open_store(root, waits=False)
            store = names.below(one)
            try:
                return Found(store, read_document(store), names)
            except ObjectNotFoundError:  # removed since
                continue
    raise UnknownIdError(f"{name}/{id}")


def published(service: Service, principal: Principal, name: str) -> dict[str, list[tuple[datetime, str]]]:
    """Where artifacts of a name lie -> when they were published, and their ids: those of jobs that the principal sees."""
    found: dict[str, list[tuple[datetime, str]]] = {}
    pattern = re.compile(rf"(?P<root>.*/{re.escape(name)})/(?P<id>{ID})")
    for job in visible_jobs(service, principal):
        uri = None if job.ended is None else job.ended.artifact
        match = None if uri is None else pattern.fullmatch(uri)
        if match is not None and service.roots.contains(match[0]):
            found.setdefault(match["root"], []).append((job.journal[-1].at, match["id"]))
    return found


def all_tags(service: Service, principal: Principal, name: str) -> dict[str, str]:
    """Tag -> id of the artifact that it is on, of those that the principal sees. UnknownIdError where there are no artifacts of
    this name."""
    known = published(service, principal, name)
    if not known:
        raise UnknownIdError(name)
    every = [(tags(open_store(root, waits=False)), {id for _, id in ids}) for root, ids in known.items()]
    return {tag: id for found, ids in every for tag, id in found.items() if id in ids}


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
