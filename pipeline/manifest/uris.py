"""Where a manifest's URIs lead: relative ones are relative to the manifest's directory.

Nothing else is done to them. Environment variables and `~` are not expanded, because what a manifest means
must not depend on who runs it; a relative path that begins with one is refused, because a folder called `~`
is never meant.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from urllib.parse import unquote

from counterweight.pipeline.manifest.explain import Complaint
from counterweight.pipeline.manifest.job import CompressionJob, TextShare
from counterweight.pipeline.manifest.problems import Path, show
from counterweight.pipeline.manifest.validation import MAX_URI, Validation
from counterweight.workers.calibration.source import (
    CalibrationSource,
    DatasetSource,
    ModelSamples,
    StandardLibrarySource,
)
from counterweight.workers.errors import RequestError
from counterweight.workers.storage.names import file_root, s3_root

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HUB = re.compile(r"hf:(//)?([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(@\w[\w./-]*)?", re.ASCII)
_EXPECTED = "expected file:, s3: or a path relative to the manifest"


def resolve_uri(uri: str, base: str | None) -> str:
    """`uri` as an absolute `file:///` or `s3://` URI.

    base: absolute URI of the directory that relative ones are relative to, or None where there is none (a
    manifest that came over the network). In `file:` and in relative URIs, `..` is resolved by the text alone.
    Raises `RequestError`.
    """
    if not uri or len(uri) > MAX_URI or not uri.isprintable():
        raise RequestError(f"expected 1 to {MAX_URI} printable characters")
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return _absolute_file(uri) if uri.startswith("/") else _join(uri, base)
    if scheme[1] == "file":
        root = file_root(uri) if uri.startswith("file:/") else None
        if root is not None:
            return _absolute_file(str(root))
        if base is not None and base.startswith("s3:"):
            raise RequestError(f"a relative file: URI in a manifest that lies in s3: {_EXPECTED}")
        return _join(unquote(uri.removeprefix("file:"), errors="surrogateescape"), base)
    if scheme[1] == "s3":
        s3_root(uri)
        return uri
    raise RequestError(f"{_EXPECTED}; a colon in a name needs './' before it")


def from_here(place: str | os.PathLike[str]) -> str:
    """A path or URI that somebody typed, as an absolute URI: paths are relative to the working directory; `hf:` is kept.
    RequestError, naming it."""
    uri = os.fspath(place)
    try:
        return uri if uri.startswith("hf:") else resolve_uri(uri, FilePath.cwd().as_uri())
    except RequestError as error:
        raise RequestError(f"{uri!r}: {error}") from error


def resolve_model_uri(uri: str, base: str | None) -> str:
    """As `resolve_uri`, but an `hf:` URI is only checked and kept. Raises `RequestError`."""
    if not uri.startswith("hf:"):
        return resolve_uri(uri, base)
    if _HUB.fullmatch(uri) is None or ".." in uri:
        raise RequestError("expected hf:owner/name or hf:owner/name@revision")
    return uri


def resolve_dataset_path(path: str, base: str | None) -> str:
    """A hub name as it is; a local directory (`./...`, `../...`, `/...` or `file:...`) as an absolute path.

    Raises `RequestError`.
    """
    if not path.startswith((".", "/", "file:")):
        return path
    root = file_root(resolve_uri(path, base))
    if root is None:
        raise RequestError("expected a hub name: a manifest that lies in s3 has no local directory beside it")
    return str(root)


def resolve_uris(job: CompressionJob, base: str | None) -> tuple[CompressionJob, list[Complaint]]:
    """The job with absolute URIs, and what is wrong with those that cannot be made absolute."""
    resolver = _Resolver(base)
    return _resolved(job, resolver), resolver.complaints


def named_uris(job: CompressionJob) -> list[tuple[Path, str]]:
    """Every place that a manifest with absolute URIs names, with its field: `file:`, `s3:` or, of the hub, `hf:`."""
    resolver = _Resolver(None)
    _resolved(job, resolver)
    return [(path, _place(uri)) for path, uri in resolver.found]


def _place(named: str) -> str:
    """What a model's or text's URI, or a data set's path or hub name, is as a URI."""
    if named.startswith("/"):
        return _absolute_file(named)
    return named if _SCHEME.match(named) else f"hf:{named}"


def _resolved(job: CompressionJob, resolver: _Resolver) -> CompressionJob:
    spec = job.spec
    calibration, validation = spec.calibration, spec.validation
    model = resolver.apply(resolve_model_uri, spec.model.uri, ("spec", "model", "uri"))
    source = resolver.tokens(calibration.source, ("spec", "calibration", "source"))
    if validation is not None:
        validation = resolver.validation(validation)
    distillation = spec.distillation
    if distillation is not None:
        distillation = distillation.model_copy(
            update={
                "texts": resolver.shares(distillation.texts, ("spec", "distillation", "texts")),
                "held_out": resolver.shares(distillation.held_out, ("spec", "distillation", "held_out")),
            }
        )
    output = resolver.apply(resolve_uri, spec.output.uri, ("spec", "output", "uri"))
    resolved = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"uri": model}),
            "calibration": calibration.model_copy(update={"source": source}),
            "distillation": distillation,
            "validation": validation,
            "output": spec.output.model_copy(update={"uri": output}),
        }
    )
    return job.model_copy(update={"spec": resolved})


class _Resolver:
    """Resolves one URI after another, and notes where each leads and what is wrong where."""

    def __init__(self, base: str | None) -> None:
        self._base = base
        self.complaints: list[Complaint] = []
        self.found: list[tuple[Path, str]] = []

    def apply(self, resolve: Callable[[str, str | None], str], uri: str, path: Path) -> str:
        try:
            resolved = resolve(uri, self._base)
        except RequestError as error:
            # The storage's errors name the URI themselves.
            cause = str(error).removeprefix(f"storage URI {uri!r}: ")
            self.complaints.append(Complaint(path=path, text=f"{show(uri)}: {cause[:200]}"))
            resolved = uri
        self.found.append((path, resolved))
        return resolved

    def tokens(self, source: CalibrationSource, path: Path) -> CalibrationSource:
        if isinstance(source, StandardLibrarySource | ModelSamples):
            return source
        if isinstance(source, DatasetSource):
            local = self.apply(resolve_dataset_path, source.path, (*path, "path"))
            return source.model_copy(update={"path": local})
        return source.model_copy(update={"uri": self.apply(resolve_uri, source.uri, (*path, "uri"))})

    def validation(self, validation: Validation) -> Validation:
        path: Path = ("spec", "validation")
        texts = {
            name: text.model_copy(update={"source": self.tokens(text.source, (*path, "texts", name, "source"))})
            for name, text in validation.texts.items()
        }
        tasks = {
            name: task.model_copy(update={"uri": self.apply(resolve_uri, task.uri, (*path, "tasks", name, "uri"))})
            for name, task in validation.tasks.items()
        }
        bounds = list(validation.bounds)
        for index, bound in enumerate(bounds):
            if bound.no_worse_than is not None:
                rival = self.apply(resolve_uri, bound.no_worse_than, (*path, "bounds", index, "no_worse_than"))
                bounds[index] = bound.model_copy(update={"no_worse_than": rival})
        text = self.tokens(validation.text, (*path, "text"))
        return validation.model_copy(update={"text": text, "texts": texts, "tasks": tasks, "bounds": tuple(bounds)})

    def shares(self, shares: Sequence[TextShare], path: Path) -> tuple[TextShare, ...]:
        return tuple(
            share.model_copy(update={"source": self.tokens(share.source, (*path, index, "source"))})
            for index, share in enumerate(shares)
        )


def _join(path: str, base: str | None) -> str:
    if base is None:
        raise RequestError("relative, but this manifest has no directory: expected file:/... or s3://...")
    if path.startswith(("~", "$")):
        raise RequestError("'~' and variables are not expanded: expected the path written out, or './~...'")
    root = file_root(base)
    if root is not None:
        return _absolute_file(os.path.join(root, path))
    place = s3_root(base)
    if place is None:
        raise RequestError(f"relative to {base!r}: expected that to be file: or s3:")
    bucket, prefix = place
    key = posixpath.normpath(posixpath.join(prefix, path))
    if key == ".." or key.startswith("../"):
        raise RequestError(f"leads out of the bucket {bucket!r}")
    uri = f"s3://{bucket}" if key == "." else f"s3://{bucket}/{key}"
    s3_root(uri)
    return uri


def _absolute_file(path: str) -> str:
    # A second leading slash has a meaning of its own in POSIX, and normpath keeps it.
    return FilePath("/" + os.path.normpath(path).lstrip("/")).as_uri()
