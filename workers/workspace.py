"""Where durable work lives between tasks: content-addressed blobs and small commit records that name them.

    _work/blobs/<sha256>               tensors, written unconditionally: the name is the content
    _work/commits/<kind>/<key>.json    created once; whoever loses takes the winner's record
    _work/prune/<nonce>                what a prune is about to delete, one name a line; `x/` is all that lies below x

A result exists when its record exists. No reader follows a blob that no record names, so a task killed anywhere leaves
at most unused bytes. Records hold what a task found (digests, errors, seconds), never paths.

Jobs and `pipeline.prune` need not know of each other. A prune deletes what is old: it writes down what it means to delete
and then looks again whether all of it is still old. A job first makes what it uses young, by writing or touching it, and
then looks whether a prune has it on its list, and last whether it is there. The store is consistent, so one of them sees the
other: the prune spares what became young; or the job waits until the list is gone; or the list is gone already, and so is
the object. What is young and there stays for the prune's age.

This rests on two bounds in time. A run of a job, from its first look-up to its publication, is shorter than the age less
`YOUNG`. A delete takes effect within `LAPSE` less `DELETING` of the moment it was asked for: a prune that was stopped for
longer (SIGSTOP, a machine asleep) in the middle of a request could break it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from pydantic import ValidationError

from counterweight.workers.checkpoint.header import LENGTH_BYTES, Header, header_length, parse_header
from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError
from counterweight.workers.parallel import in_parallel
from counterweight.workers.storage import ObjectInfo, ObjectStore

WORK = "_work"
"""Everything here lies under this prefix of the output's root; no job can have this name (`_` is not allowed in one)."""

BLOBS = f"{WORK}/blobs"
COMMITS = f"{WORK}/commits"
PRUNES = f"{WORK}/prune"

YOUNG = timedelta(hours=1)
"""A store may leave an object that is touched before this age as it is."""

LAPSE = timedelta(minutes=15)
"""Age at which a prune's list no longer counts: the prune was killed."""

DELETING = timedelta(minutes=5)
"""How long a prune deletes after it wrote its list. The rest of `LAPSE` is for requests that are repeated."""

POLL_SECONDS = 1.0
"""Between two looks of a job at the list that it waits for."""

COMMIT_ATTEMPTS = 3


class Blob(Config):
    """A stored object by content: its sha256 (hex) and size in bytes."""

    sha256: str
    size: int

    @property
    def key(self) -> str:
        return f"{BLOBS}/{self.sha256}"


class Record(Config):
    """Base of what a commit holds."""

    @property
    def stored(self) -> tuple[Blob, ...]:
        """Blobs without which the record does not count: the task is done again."""
        return ()

    @property
    def hidden_states(self) -> tuple[Blob, ...]:
        """Blobs that the next task reads and that are discarded when the job is published: they can be made again."""
        return ()


AnyRecord = TypeVar("AnyRecord", bound=Record)


class Workspace:
    """The durable state below one store; picklable, as its store is."""

    def __init__(self, store: ObjectStore, *, trusting: bool = True) -> None:
        """trusting: whether bytes that are there are taken for those that they should be, and not written again."""
        self.store, self._trusting = store, trusting

    def put(self, blob: Blob, pieces: Callable[[], Iterable[memoryview]], *, durable: bool = True) -> Blob:
        """Stores a blob's bytes; those that are already there are touched and not written again.

        pieces: begins the bytes anew. durable: see `ObjectStore.open_writer`; False for hidden states, which a resumed job
        makes again when they are gone.
        """
        while True:
            if not (self._trusting and self.has(blob) and self.store.touch(blob.key, YOUNG)):
                with self.store.open_writer(blob.key, durable=durable, sha256=blob.sha256) as writer:
                    for piece in pieces():
                        writer.write(piece)
                    writer.commit()
            if self.spared(blob.key):
                return blob

    def get_bytes(self, blob: Blob) -> bytes:
        """The blob's bytes, every one verified. IntegrityError, ObjectNotFoundError."""
        return self.store.read(blob.key, sha256=blob.sha256)

    def get_header(self, blob: Blob) -> Header:
        """What the blob says of its tensors, not verified: who reads them finds out."""
        file = self.store.uri_of(blob.key)
        length = header_length(self.store.read_range(blob.key, 0, LENGTH_BYTES), file=file, file_size=blob.size)
        return parse_header(self.store.read_range(blob.key, LENGTH_BYTES, length), file=file, file_size=blob.size)

    def has(self, blob: Blob) -> bool:
        """Whether the blob's bytes are there, whole (by size; reading verifies them)."""
        try:
            return self.store.size(blob.key) == blob.size
        except ObjectNotFoundError:
            return False

    def discard(self, *blobs: Blob) -> None:
        """Deletes blobs that no job needs any more, several at a time: a job has thousands, and S3 takes its time."""
        for _ in in_parallel(lambda blob: self.store.delete(blob.key), blobs):
            pass

    def lookup(self, kind: str, key: str, record: type[AnyRecord]) -> AnyRecord | None:
        """The committed record of a task, which then stays for the age of a prune and with it the blobs that it names; or
        None. IntegrityError when what is there is no such record."""
        name = f"{COMMITS}/{kind}/{key}.json"
        while self.store.touch(name, YOUNG):
            if self.spared(name):
                return self._record(name, record)
        return None

    def _record(self, name: str, record: type[AnyRecord]) -> AnyRecord:
        data = self.store.read(name)
        try:
            return record.model_validate_json(data)
        except ValidationError as error:
            raise IntegrityError(
                f"{self.store.uri_of(name)}: not a {record.__name__}: {first_problem(error)}"
            ) from error

    def commit(self, kind: str, key: str, record: AnyRecord) -> AnyRecord:
        """Publishes a task's record once; returns the record that holds, ours or an earlier one."""
        name = f"{COMMITS}/{kind}/{key}.json"
        for _ in range(COMMIT_ATTEMPTS):
            if self.store.create(name, record.model_dump_json(indent=1).encode()):
                if self.spared(name):
                    return record
            elif (earlier := self.lookup(kind, key, type(record))) is not None:
                return earlier
            # A prune removed an earlier record of this key; ours may be gone with it.
        raise IntegrityError(f"{self.store.uri_of(name)}: a record was there and is gone, {COMMIT_ATTEMPTS} times")

    def spared(self, key: str) -> bool:
        """Whether an object that was just made young is there to stay. Waits until a prune that is about to delete it is over;
        after False, make it or touch it again."""
        waited = False
        while any(
            self._condemns(listed.key, key) and not self._lapsed(listed) for listed in self.store.list(f"{PRUNES}/")
        ):
            waited = True
            time.sleep(POLL_SECONDS)
        return not waited and self.store.exists(key)

    @contextmanager
    def condemned(self, names: Iterable[str]) -> Iterator[Callable[[], bool]]:
        """A prune's list of what it means to delete, for the length of the block. Inside, look again at what is old, and ask
        before each delete whether there is still time."""
        end = time.monotonic() + DELETING.total_seconds()
        key = f"{PRUNES}/{uuid.uuid4().hex}"
        self.store.write(key, "".join(f"{name}\n" for name in names).encode())
        try:
            yield lambda: time.monotonic() < end
        finally:
            self.store.delete(key)

    def _condemns(self, listed: str, key: str) -> bool:
        try:
            names = self.store.read(listed).decode(errors="replace").split("\n")
        except ObjectNotFoundError:  # that prune is over
            return False
        return any(key == name or (name.endswith("/") and key.startswith(name)) for name in names)

    def _lapsed(self, listed: ObjectInfo) -> bool:
        return self.store.now() - listed.modified > LAPSE
