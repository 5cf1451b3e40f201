"""From a file, an object or a request's body to a typed job with absolute URIs."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TypeVar
from urllib.parse import unquote

from pydantic import ValidationError

from counterweight.pipeline.manifest.calibration import Section
from counterweight.pipeline.manifest.document import MAX_BYTES, parse_json, parse_yaml, too_large
from counterweight.pipeline.manifest.explain import MAX_EXPLAINED, Complaint, explain
from counterweight.pipeline.manifest.job import CompressionJob
from counterweight.pipeline.manifest.overrides import apply_overrides
from counterweight.pipeline.manifest.problems import Path, path_text, problem, refusal, show, source_text
from counterweight.pipeline.manifest.schema import schema_of
from counterweight.pipeline.manifest.uris import resolve_uris
from counterweight.workers.errors import ManifestError, ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.storage import open_store, split_uri
from counterweight.workers.storage.names import file_root

BATCH = "CompressionBatch"

AnyManifest = TypeVar("AnyManifest", bound=Section)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedManifest:
    """A validated job whose URIs are absolute.

    base: URI of the directory that they were relative to, or None for a manifest without one.
    """

    job: CompressionJob
    base: str | None


def load_manifest(location: str, overrides: Sequence[str] = ()) -> LoadedManifest:
    """The job in the file or object at `location`, with `overrides` (`path=value`, see `apply_overrides`).

    location: a local path, or a `file:` or `s3:` URI; a name that ends in `.json` is read as JSON, any other
    as YAML.

    Raises `ManifestError`, with one line for each problem, when there is no such manifest or it describes no
    job, and `StorageError` when the store cannot be read at the moment.
    """
    data, base = read_manifest(location)
    return parse_manifest(data, name=location, base=base, overrides=overrides)


def read_manifest(location: str) -> tuple[bytes, str]:
    """The text of the file or object at `location`, and the URI of the directory that its URIs are relative to. ManifestError,
    StorageError."""
    scheme = _SCHEME.match(location)
    if scheme is None:
        return _read_file(FilePath(location), location)
    if scheme[1] == "file":
        return _read_file(_local_path(location), location)
    if scheme[1] == "s3":
        return _read_object(location)
    raise ManifestError(f"{source_text(location)}: expected a path, a file: or an s3: URI of a manifest")


def parse_manifest(data: bytes | str, *, name: str, base: str | None, overrides: Sequence[str] = ()) -> LoadedManifest:
    """The job that the text `data` describes.

    name: what errors of the text as a whole call it; `.json` at its end means JSON.
    base: absolute URI of the directory that relative URIs are relative to; None: they are refused.

    Raises `ManifestError` with one line for each problem.
    """
    document = parse_document(data, name)
    changed = apply_overrides(document, overrides)
    if document.get("kind") == BATCH:
        raise problem(("kind",), f"{BATCH!r}: expected 'CompressionJob': a batch is for `counterweight submit`")
    job, complaints = resolve_uris(validated(CompressionJob, document, changed), base)
    if complaints:
        raise refusal([_line(complaint, changed) for complaint in complaints])
    return LoadedManifest(job=job, base=base)


def parse_document(data: bytes | str, name: str) -> dict[str, object]:
    """The mapping that a manifest's text is, of whatever kind. ManifestError."""
    parse = parse_json if name.endswith(".json") else parse_yaml
    document = parse(data, name=source_text(name))
    if not isinstance(document, dict):
        raise problem((), f"{show(document)}: expected a mapping with apiVersion, kind, metadata and spec")
    return document


def validated(kind: type[AnyManifest], document: dict[str, object], changed: Sequence[Path]) -> AnyManifest:
    """The document as a manifest of a kind, whose JSON Schema explains what is wrong. changed: paths that were overridden.
    ManifestError with one line for each problem."""
    try:
        # Strict mode takes a list for a tuple only from JSON: in Python the two differ, in a manifest they
        # cannot.
        return kind.model_validate_json(json.dumps(document, allow_nan=False), strict=True)
    except ValidationError as error:
        complaints = explain(error, document, schema_of(kind))
        unexplained = max(0, error.error_count() - MAX_EXPLAINED)
        raise refusal([_line(complaint, changed) for complaint in complaints], unexplained) from error


def _line(complaint: Complaint, changed: Sequence[Path]) -> str:
    """The complaint, with the override that it is about or that leads through the place it is about."""
    for path in reversed(changed):
        shorter = min(len(path), len(complaint.path))
        if path[:shorter] == complaint.path[:shorter] and not (complaint.missing and shorter < len(path)):
            return f"{complaint} (with --set {path_text(path)})"
    return str(complaint)


def _local_path(uri: str) -> FilePath:
    try:
        root = file_root(uri) if uri.startswith("file:/") else None
    except RequestError as error:
        raise ManifestError(str(error)) from error
    return root or FilePath(unquote(uri.removeprefix("file:"), errors="surrogateescape"))


def _read_file(path: FilePath, name: str) -> tuple[bytes, str]:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ManifestError(f"{source_text(name)}: not a regular file, expected a YAML or JSON file")
            data = file.read(MAX_BYTES + 1)
        # Not the file's own links: Kubernetes mounts a manifest as a link into a directory that holds nothing
        # else.
        base = path.absolute().parent.resolve().as_uri()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ManifestError(f"{source_text(name)}: cannot be read: {cause}") from error
    return data, base


def _without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would wait for a writer that may never come.
    return os.open(path, flags | os.O_NONBLOCK)


def _read_object(uri: str) -> tuple[bytes, str]:
    try:
        root, key = split_uri(uri)
        store = open_store(root)
        if (size := store.size(key)) > MAX_BYTES:
            raise too_large(source_text(uri))
        return store.read_range(key, 0, size), store.uri
    except ObjectNotFoundError as error:
        raise ManifestError(f"{source_text(uri)}: no such object, expected a manifest") from error
    except StorageError:
        raise
    except RequestError as error:
        raise ManifestError(str(error)) from error
