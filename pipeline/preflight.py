"""What can be wrong with a job and costs a second to see: looked at before Ray and workers start, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_files import check_files, resolve, tokenizer_of
from counterweight.pipeline.texts import Texts, read_texts, usual_special_tokens
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
    config = check_files(model)
    check_apart(job.spec.output.uri, root)
    check_positions(job, config)
    try:
        output = open_store(job.spec.output.uri)
        probe(output)
    except RequestError as error:
        raise RequestError(f"spec.output.uri: {error}") from error
    return Ready(root=root, output=output, texts=read_texts(job, tokenizer_of(model), usual_special_tokens(config)))


def check_positions(job: CompressionJob, config: Mapping[str, object]) -> None:
    """RequestError when the windows of the validation are longer than the texts that a model was made for: what it does behind
    them says nothing of it. config: of the model."""
    length, known = job.spec.validation_sequence_length, positions(config)
    if length is not None and known is not None and length > known:
        raise RequestError(
            f"spec.validation.sequence_length: {length}: expected at most {known}, the positions of the model (config.json)"
        )


def positions(config: Mapping[str, object]) -> int | None:
    """How many positions a config.json gives a model; None where it does not say. A rotary embedding that is scaled beyond the
    positions that it was trained on (YaRN) has its factor times as many."""
    inside = config.get("text_config")
    config = inside if isinstance(inside, Mapping) else config
    known, scaling = config.get("max_position_embeddings"), config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(known, int):
        return None
    if isinstance(scaling, Mapping):
        factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings", known)
        if isinstance(factor, int | float) and trained == known:
            return int(known * max(factor, 1))
    return known


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
