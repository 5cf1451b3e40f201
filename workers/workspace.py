"""Where durable work lives between tasks: content-addressed blobs and small commit records that name them.

    _work/blobs/<sha256>               tensors, written unconditionally: the name is the content
    _work/commits/<kind>/<key>.json    created once; whoever loses takes the winner's record

A result exists when its record exists. No reader follows a blob that no record names, so a task killed anywhere leaves
at most unused bytes. Records hold what a task found (digests, errors, seconds), never paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError
from torch import Tensor

from counterweight.workers.checkpoint.writer import read_safetensors, safetensors_pieces
from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError
from counterweight.workers.storage import ObjectStore

WORK = "_work"
"""Everything here lies under this prefix of the output's root; no job can have this name (`_` is not allowed in one)."""

BLOBS = f"{WORK}/blobs"
COMMITS = f"{WORK}/commits"


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

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def put_tensors(self, tensors: Mapping[str, Tensor], *, durable: bool = True) -> Blob:
        """Stores tensors as one safetensors blob; bytes that are already there are not written again.

        durable: see `ObjectStore.open_writer`; False for hidden states, which a resumed job makes again when they are gone.
        """
        digest, size = hashlib.sha256(), 0
        for piece in safetensors_pieces(tensors):
            digest.update(piece)
            size += len(piece)
        blob = Blob(sha256=digest.hexdigest(), size=size)
        if not self.has(blob):
            with self.store.open_writer(blob.key, durable=durable) as writer:
                for piece in safetensors_pieces(tensors):
                    writer.write(piece)
                writer.commit()
        return blob

    def get_bytes(self, blob: Blob) -> bytes:
        """The blob's bytes, every one verified. IntegrityError, ObjectNotFoundError."""
        return self.store.read(blob.key, sha256=blob.sha256)

    def get_tensors(self, blob: Blob) -> dict[str, Tensor]:
        """The blob's tensors, every byte verified."""
        return read_safetensors(self.get_bytes(blob), file=self.store.uri_of(blob.key))

    def has(self, blob: Blob) -> bool:
        """Whether the blob's bytes are there, whole (by size; reading verifies them)."""
        try:
            return self.store.size(blob.key) == blob.size
        except ObjectNotFoundError:
            return False

    def discard(self, blob: Blob) -> None:
        """Deletes a blob that no job needs any more."""
        self.store.delete(blob.key)

    def lookup(self, kind: str, key: str, record: type[AnyRecord]) -> AnyRecord | None:
        """The committed record of a task, or None. IntegrityError when what is there is no such record."""
        name = f"{COMMITS}/{kind}/{key}.json"
        try:
            data = self.store.read(name)
        except ObjectNotFoundError:
            return None
        try:
            return record.model_validate_json(data)
        except ValidationError as error:
            raise IntegrityError(
                f"{self.store.uri_of(name)}: not a {record.__name__}: {first_problem(error)}"
            ) from error

    def commit(self, kind: str, key: str, record: AnyRecord) -> AnyRecord:
        """Publishes a task's record once; returns the record that holds, ours or an earlier one."""
        name = f"{COMMITS}/{kind}/{key}.json"
        if self.store.create(name, record.model_dump_json(indent=1).encode()):
            return record
        earlier = self.lookup(kind, key, type(record))
        if earlier is None:
            raise IntegrityError(f"{self.store.uri_of(name)}: a record was there and is gone")
        return earlier
