"""What can be wrong with a job and costs a second to see: looked at before Ray and workers start, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_files import check_files, resolve, tokenizer_of
from counterweight.pipeline.texts import Texts, read_texts
from counterweight.workers.errors import RequestError
from counterweight.workers.storage import ObjectStore, open_store, probe
from counterweight.workers.storage.names import file_root, s3_root


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A job that may begin. root: where its model lies. output: where artifacts go, checked for what we need of it. texts: as
    windows of token ids."""

    root: str
    output: ObjectStore
    texts: Texts


def look(job: CompressionJob) -> Ready:
    """The model's config and index, the output, the texts through the model's tokenizer. RequestError and its kinds,
    StorageError."""
    root = resolve(job.spec.model.uri)
    model = open_store(root)
    check_files(model)
    check_apart(job.spec.output.uri, root)
    try:
        output = open_store(job.spec.output.uri)
        probe(output)
    except RequestError as error:
        raise RequestError(f"spec.output.uri: {error}") from error
    return Ready(root=root, output=output, texts=read_texts(job, tokenizer_of(model)))


def check_apart(output: str, model: str) -> None:
    """RequestError when artifacts would go into the model's folder, or below it: it is read while they are written. output,
    model: root URIs."""
    written, read = _place(output), _place(model)
    if written is not None and read is not None and written.is_relative_to(read):
        raise RequestError(f"spec.output.uri: {output}: in the model's folder, {model}: expected a place of its own")


def _place(uri: str) -> PurePosixPath | None:
    """A path that tells whether one place lies in another; links are followed."""
    if (path := file_root(uri)) is not None:
        return PurePosixPath("file", os.path.realpath(path).lstrip("/"))
    place = s3_root(uri)
    return None if place is None else PurePosixPath("s3", *place)
