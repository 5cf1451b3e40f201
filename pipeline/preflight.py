"""What can be wrong with a job and costs a second to see: looked at before Ray and workers start, without torch."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from counterweight.pipeline.judging.task_files import read_documents
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_files import check_files, positions_of, resolve, tokenizer_of
from counterweight.pipeline.texts import Texts, check_texts, read_texts, usual_special_tokens
from counterweight.workers.errors import RequestError
from counterweight.workers.storage import ObjectStore, open_store, probe
from counterweight.workers.storage.names import file_root, s3_root

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""Owner and name of a repository."""


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
    root, model, config = _model(job)
    try:
        output = open_store(job.spec.output.uri)
        probe(output)
    except RequestError as error:
        raise RequestError(f"spec.output.uri: {error}") from error
    if job.spec.validation is not None and job.spec.validation.tasks:
        read_documents(job.spec.validation, model)
    texts = read_texts(job, tokenizer_of(model), usual_special_tokens(config))
    return Ready(root=root, output=output, texts=texts)


def check_positions(job: CompressionJob, config: Mapping[str, object]) -> None:
    """RequestError when the windows of the validation are longer than the texts that a model was made for: what it does behind
    them says nothing of it. config: of the model."""
    length, known = job.spec.validation_sequence_length, positions_of(config)
    if length is not None and known is not None and length > known:
        raise RequestError(
            f"spec.validation.sequence_length: {length}: expected at most {known}, the positions of the model (config.json)"
        )


def look_only(job: CompressionJob) -> tuple[str, Callable[[], None]]:
    """As `look`, for somebody who asks and does not begin: nothing is written, and texts are read as far as it takes to see
    that they are long enough. Returns where the model lies, and what looks at its texts, which may last a second."""
    root, model, config = _model(job)
    _check_writable(job.spec.output.uri)
    return root, lambda: check_texts(job, tokenizer_of(model), usual_special_tokens(config))


def _model(job: CompressionJob) -> tuple[str, ObjectStore, Mapping[str, Any]]:
    """Where the model lies, looked at as far as its config and its index tell; and its config.json."""
    root = resolve(job.spec.model.uri)
    _check_folder(root)
    model = open_store(root)
    config = check_files(model)
    check_positions(job, config)
    check_apart(job.spec.output.uri, root)
    return root, model, config


def beyond_positions(job: CompressionJob, config: Mapping[str, object]) -> str | None:
    """What should be known of windows of the calibration that are longer than the texts that the model was made for; None of
    others. config: of the model."""
    length, known = job.spec.calibration.sequence_length, positions_of(config)
    if known is None or length <= known:
        return None
    return (
        f"spec.calibration.sequence_length: {length}: more than the {known} positions of the model "
        "(config.json: max_position_embeddings): what it does behind them is calibrated on too"
    )


def _check_folder(root: str) -> None:
    """RequestError for a folder that is not there, with the repository of a hub that may have been meant."""
    path = file_root(root)
    if path is None or path.exists():
        return
    meant = "/".join(path.parts[-2:])
    hint = f"; a repository of Hugging Face's hub begins with hf: (hf:{meant})" if HUB_NAME.fullmatch(meant) else ""
    raise RequestError(f"spec.model.uri: {root}: no such folder: expected that of a checkpoint in safetensors{hint}")


def _check_writable(output: str) -> None:
    """RequestError where a folder on this machine cannot be written to: tried with one that is removed at once."""
    root = file_root(output)
    if root is None:
        return
    existing = next(path for path in (root, *root.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".counterweight-", dir=existing):
            pass
    except OSError as error:
        raise RequestError(f"spec.output.uri: {output}: cannot be written: {existing}: {error.strerror}") from error


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
