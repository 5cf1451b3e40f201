"""All bytes of an artifact: checked where they lie, or fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from counterweight.pipeline.artifact.document import DOCUMENT, ArtifactDocument, FileEntry
from counterweight.pipeline.artifact.reader import check_named, resolve
from counterweight.pipeline.artifact.remote import RemoteArtifact, is_remote
from counterweight.workers.errors import IntegrityError, ObjectNotFoundError, RequestError
from counterweight.workers.parallel import in_parallel
from counterweight.workers.storage import ObjectStore, fetch, open_store, stream_sha256
from counterweight.workers.storage.fetch import PARTIAL, Source


def verify(uri: str, done: Callable[[str, int], None] = lambda *_: None) -> ArtifactDocument:
    """Reads every byte of an artifact and compares it with artifact.json; `done(path, bytes)` after each file. Then every
    tensor, block by block, as `load_model` would.

    IntegrityError listing every file that is missing, of another size or of other content. CheckpointError when the files are
    those of artifact.json and make no model: names, shapes, digests of tensors, NaN.
    """
    store, document = resolve(uri)
    problems: list[str] = []
    for path, entry in sorted(document.files.items()):
        problem = _difference(store, path, entry)
        if problem is not None:
            problems.append(problem)
        done(path, entry.size)
    if problems:
        raise IntegrityError(
            f"{store.uri}: {len(problems)} of {len(document.files)} files differ:\n" + "\n".join(problems)
        )
    check_named(store, document)
    _check_tensors(store)
    return document


def _check_tensors(store: ObjectStore) -> None:
    import torch

    from counterweight.workers.compressed import CompressedModel

    model = CompressedModel.open(store)
    model.embedding()
    model.head()
    for index in range(model.builder.blocks):
        model.block(index, torch.device("cpu"), torch.float32)


def pull(uri: str, destination: Path, done: Callable[[str, int], None] = lambda *_: None) -> ArtifactDocument:
    """Downloads an artifact into a directory, resuming what an earlier pull left; every byte is checked. uri: of its store, or
    of a service: https://host/v1/artifacts/NAME/ID (`artifact.remote`).

    The directory is a checkpoint as transformers and vLLM read it. artifact.json comes last: a directory that has it is whole.
    RequestError for a directory that holds something else than an artifact, or what a pull that was cut off has left.
    """
    store: Source
    if is_remote(uri):
        store = RemoteArtifact(uri)
        text, document = store.text, store.document
    else:
        store, document = found = resolve(uri)
        text = found[0].read(DOCUMENT)
    _check_empty(destination, document)
    local = open_store(destination.absolute().as_uri())
    if local.exists(DOCUMENT) and local.read(DOCUMENT) != text:
        local.delete(DOCUMENT)  # another artifact's: from now on its files are being replaced

    def one(item: tuple[str, FileEntry]) -> tuple[str, FileEntry]:
        path, entry = item
        fetch(store, path, destination / path, size=entry.size, sha256=entry.sha256, root=destination)
        return item

    for path, entry in in_parallel(one, sorted(document.files.items())):
        done(path, entry.size)
    local.write(DOCUMENT, text)
    return document


def _check_empty(destination: Path, document: ArtifactDocument) -> None:
    if not destination.exists() or (destination / DOCUMENT).exists():
        return
    if not destination.is_dir():
        raise RequestError(f"{destination}: expected a folder")
    files = {path.relative_to(destination).as_posix() for path in destination.rglob("*") if not path.is_dir()}
    others = sorted(files - document.files.keys() - {f"{name}{PARTIAL}" for name in document.files})
    if others:
        raise RequestError(
            f"{destination}: holds {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, which is not of the "
            "artifact: expected a folder that is new, empty, or of an earlier pull"
        )


def _difference(store: ObjectStore, path: str, entry: FileEntry) -> str | None:
    try:
        size = store.size(path)
        if size != entry.size:
            return f"{path}: {size} bytes, expected {entry.size}"
        actual = stream_sha256(store, path)
    except ObjectNotFoundError:
        return f"{path}: missing"
    return None if actual == entry.sha256 else f"{path}: sha256 {actual}, expected {entry.sha256}"
