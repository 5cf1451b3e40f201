"""Finding and opening an artifact: a directory of objects that its `artifact.json` names, with size and sha256 of each.

<output>/<name>/<id>/artifact.json     written last, once: with it the artifact becomes visible
<output>/<name>/latest.json            points to the newest id
<output>/<name>/tags/<tag>/            say which id a tag is on (`tags`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from pydantic import ValidationError

from counterweight.pipeline.artifact.document import (
    CONFIG,
    DOCUMENT,
    INDEX,
    LATEST,
    REPORT,
    ArtifactDocument,
    FileEntry,
)
from counterweight.pipeline.artifact.tags import named_by_tag, tagged, tags
from counterweight.workers.checkpoint.layout import check_index
from counterweight.workers.checkpoint.strict_json import check_object, parse_object
from counterweight.workers.config import Config, first_problem
from counterweight.workers.errors import CheckpointError, IntegrityError, ObjectNotFoundError, RequestError
from counterweight.workers.ledger import ADAPTER, ADAPTER_CONFIG, LEDGER, RESIDUAL_STORE, Ledger
from counterweight.workers.storage import ObjectStore, open_store
from counterweight.workers.storage.names import check_key

MAX_DOCUMENT_BYTES = 16 << 20
"""An artifact.json names files, not tensors: this is room for a hundred thousand."""

MAX_DOCUMENT_VALUES = 20_000_000
"""JSON values in a document; a report has some dozens for every linear."""

MAX_FILES = 10_000
"""Of one artifact; a checkpoint has at most 4096 shards."""

MANDATORY = (CONFIG, INDEX, LEDGER, REPORT)
"""Files without which nothing is an artifact. Further ones follow from what these say."""

MAX_POINTER_BYTES = 64 << 10
"""A latest.json has an id, a URI and a time."""


D = TypeVar("D", bound=Config)


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
        """The artifact, when it is visible. IntegrityError where its document is not what a job writes: its name is ours, so it
        was damaged, in storage or on the way."""
        try:
            document = read_document(open_store(self.uri))
        except ObjectNotFoundError:
            return None
        except CheckpointError as error:
            raise IntegrityError(f"{error}: expected the document that a run of this job wrote") from error
        return Published(self.uri, document, existing=True)


class Named(Protocol):
    """What names its objects for people."""

    def uri_of(self, key: str) -> str: ...


class Documents(Named, Protocol):
    """What documents are read from."""

    def read_bounded(self, key: str, most: int) -> bytes: ...


def read_document(store: Documents) -> ArtifactDocument:
    """artifact.json at a store's root. ObjectNotFoundError when the artifact is not visible, CheckpointError when the
    document is not one."""
    document = parsed(
        ArtifactDocument, store, DOCUMENT, "an artifact's", store.read_bounded(DOCUMENT, MAX_DOCUMENT_BYTES)
    )
    if len(document.files) > MAX_FILES:
        raise CheckpointError(
            f"{store.uri_of(DOCUMENT)}: files: {len(document.files)} of them: expected at most {MAX_FILES}"
        )
    for path in document.files:
        check_key(path)
    for path in MANDATORY:
        file_entry(store, document, path)
    return document


def parsed(kind: type[D], store: Named, path: str, what: str, data: bytes) -> D:
    """A document of an artifact; CheckpointError for one in which a key occurs twice, or that is no such document."""
    uri = store.uri_of(path)
    try:
        check_object(data, file=uri, max_values=MAX_DOCUMENT_VALUES)
        return kind.model_validate_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{uri}: not {what}: {str(error).removeprefix(f'{uri}: ')}") from error
    except ValidationError as error:
        raise CheckpointError(f"{uri}: not {what}: {first_problem(error)}") from error


def resolve(uri: str) -> tuple[ObjectStore, ArtifactDocument]:
    """The artifact at `uri`: an artifact's root; or the root of a name, whose latest.json then says which; or NAME@TAG.

    RequestError when none of them is there.
    """
    if (named := named_by_tag(uri)) is not None:
        return _tagged(*named)
    store = open_store(uri)
    try:
        return store, read_document(store)
    except ObjectNotFoundError:
        pass
    try:
        pointer = store.read_bounded(LATEST, MAX_POINTER_BYTES)
    except ObjectNotFoundError as error:
        raise RequestError(f"{uri}: no {DOCUMENT} and no {LATEST}: expected a published artifact") from error
    try:
        newest = check_key(str(parse_object(pointer, file=LATEST, max_values=100)["id"]))
    except (KeyError, RequestError) as error:
        raise CheckpointError(f"{store.uri_of(LATEST)}: {error}: expected an object with an id") from error
    below = store.below(newest)
    try:
        return below, read_document(below)
    except ObjectNotFoundError as error:
        raise RequestError(f"{uri}: {LATEST} names {newest}, which has no {DOCUMENT}") from error


def _tagged(root: str, tag: str) -> tuple[ObjectStore, ArtifactDocument]:
    names = open_store(root)
    id = tagged(names, tag)
    if id is None:
        raise RequestError(f"{root}@{tag}: no such tag: expected one of {', '.join(tags(names)) or 'none'}")
    return names.below(id), read_document(names.below(id))


def open_artifact(uri: str) -> tuple[ObjectStore, ArtifactDocument]:
    """As `resolve`; the files that say how the tensors are to be read are compared with artifact.json. The tensors'
    own digests stand in one of them, the ledger.

    IntegrityError when one differs, CheckpointError when one is not named.
    """
    store, document = resolve(uri)
    for path in (CONFIG, LEDGER, INDEX):
        store.read(path, sha256=file_entry(store, document, path).sha256)
    check_named(store, document)
    return store, document


def check_named(store: ObjectStore, document: ArtifactDocument) -> None:
    """CheckpointError when a file that the index or the ledger speak of is not among those of artifact.json."""
    weight_map = check_index(parse_object(store.read(INDEX), file=INDEX, max_values=MAX_DOCUMENT_VALUES))
    ledger = parsed(Ledger, store, LEDGER, "a ledger", store.read(LEDGER))
    spoken_of = set(weight_map.values())
    if any(form.rank for form in ledger.formats.values()):
        spoken_of |= {ADAPTER, ADAPTER_CONFIG}
    if any(form.residual is not None for form in ledger.formats.values()):
        spoken_of.add(RESIDUAL_STORE)
    for path in sorted(spoken_of):
        file_entry(store, document, path)


def file_entry(store: Named, document: ArtifactDocument, path: str) -> FileEntry:
    """What artifact.json says of a file that every artifact has; CheckpointError when it says nothing."""
    if path not in document.files:
        raise CheckpointError(f"{store.uri_of(DOCUMENT)}: files: no {path}: expected every file of an artifact")
    return document.files[path]
