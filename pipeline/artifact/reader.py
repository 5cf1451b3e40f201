"""Finding and opening an artifact: a directory of objects that its `artifact.json` names, with size and sha256 of each.

<output>/<name>/<id>/artifact.json     written last, once: with it the artifact becomes visible
<output>/<name>/latest.json            points to the newest id
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import ValidationError

from counterweight.pipeline.artifact.document import CONFIG, DOCUMENT, INDEX, LATEST, ArtifactDocument, FileEntry
from counterweight.workers.config import first_problem
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError, RequestError
from counterweight.workers.ledger import LEDGER
from counterweight.workers.storage import ObjectStore, open_store
from counterweight.workers.storage.names import check_key

MAX_DOCUMENT_BYTES = 16 << 20
"""An artifact.json names files, not tensors: this is room for a hundred thousand."""

MAX_POINTER_BYTES = 64 << 10
"""A latest.json has an id, a URI and a time."""


@dataclass(frozen=True, slots=True)
class Published:
    """A visible artifact. existing: it was there before this run."""

    uri: str
    document: ArtifactDocument
    existing: bool


@dataclass(frozen=True, slots=True)
class Artifact:
    """Names of one artifact's objects below an output root."""

    store: ObjectStore
    name: str
    id: str

    def key(self, path: str) -> str:
        """The key of the artifact's file `path`."""
        return f"{self.name}/{self.id}/{path}"

    @property
    def uri(self) -> str:
        """The artifact's root URI."""
        return f"{self.store.uri.rstrip('/')}/{self.name}/{self.id}"

    def published(self) -> Published | None:
        """The artifact, when it is visible."""
        try:
            document = read_document(open_store(self.uri))
        except ObjectNotFoundError:
            return None
        return Published(self.uri, document, existing=True)


def read_document(store: ObjectStore) -> ArtifactDocument:
    """artifact.json at a store's root. ObjectNotFoundError when the artifact is not visible, IntegrityError when the
    document is not one."""
    try:
        document = ArtifactDocument.model_validate_json(_bounded(store, DOCUMENT, MAX_DOCUMENT_BYTES))
    except ValidationError as error:
        raise IntegrityError(f"{store.uri_of(DOCUMENT)}: not an artifact's: {first_problem(error)}") from error
    for path in document.files:
        check_key(path)
    return document


def resolve(uri: str) -> tuple[ObjectStore, ArtifactDocument]:
    """The artifact at `uri`: an artifact's root, or the root of a name, whose latest.json then says which.

    RequestError when neither is there.
    """
    store = open_store(uri)
    try:
        return store, read_document(store)
    except ObjectNotFoundError:
        pass
    try:
        pointer = _bounded(store, LATEST, MAX_POINTER_BYTES)
    except ObjectNotFoundError as error:
        raise RequestError(f"{uri}: no {DOCUMENT} and no {LATEST}: expected a published artifact") from error
    try:
        newest = check_key(str(json.loads(pointer)["id"]))
    except (ValueError, KeyError, TypeError, RecursionError, RequestError) as error:
        raise IntegrityError(f"{store.uri_of(LATEST)}: {error}: expected an object with an id") from error
    below = store.below(newest)
    try:
        return below, read_document(below)
    except ObjectNotFoundError as error:
        raise RequestError(f"{uri}: {LATEST} names {newest}, which has no {DOCUMENT}") from error


def open_artifact(uri: str) -> tuple[ObjectStore, ArtifactDocument]:
    """As `resolve`; the files that say how the tensors are to be read are compared with artifact.json. The tensors'
    own digests stand in one of them, the ledger.

    IntegrityError when one differs or is not named.
    """
    store, document = resolve(uri)
    for path in (CONFIG, LEDGER, INDEX):
        store.read(path, sha256=file_entry(store, document, path).sha256)
    return store, document


def file_entry(store: ObjectStore, document: ArtifactDocument, path: str) -> FileEntry:
    """What artifact.json says of a file that every artifact has; IntegrityError when it says nothing."""
    if path not in document.files:
        raise IntegrityError(f"{store.uri_of(DOCUMENT)}: files: no {path}: expected every file of an artifact")
    return document.files[path]


def _bounded(store: ObjectStore, key: str, most: int) -> bytes:
    size = store.size(key)
    if size > most:
        raise IntegrityError(f"{store.uri_of(key)}: {size} bytes, expected at most {most}")
    return store.read_range(key, 0, size)
