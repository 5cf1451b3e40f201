"""The files of a source model, looked at without torch: where they are, and whether they can be a model at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from counterweight.workers.calibration.encoder import MAX_TOKENIZER_BYTES
from counterweight.workers.checkpoint.beside import beside
from counterweight.workers.checkpoint.layout import read_layout
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.models.config_values import check_layers, check_values
from counterweight.workers.models.families import family_of
from counterweight.workers.storage import ObjectStore

HUB = "hf:"
TOKENIZER = "tokenizer.json"

HUB_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
"""What a snapshot of a hub repository consists of; never pickles, never code."""


def check_files(store: ObjectStore) -> Mapping[str, object]:
    """The config.json of a model. CheckpointError, UnsupportedModelError or RequestError for a folder that is none, as far as
    config, index and the presence of a first file of weights tell. Headers and shapes are for `model_source.open_model`."""
    try:
        layout = read_layout(store)
        check_values(layout.config)
        family_of(layout.config.get("model_type"))
        if layout.weight_map is not None:
            check_layers(layout.config, layout.weight_map)
        store.size(layout.shards[0])
        for entry in beside(store, layout.shards):
            if entry.fate == "carried":
                store.size(entry.name)  # a link that leads out of the folder is refused before anything is begun
    except ObjectNotFoundError as error:
        raise CheckpointError(f"{store.uri}: {error}: expected every file that the index names") from error
    except CheckpointError as error:
        raise CheckpointError(f"{store.uri}: {error}") from error
    return layout.config


def tokenizer_of(store: ObjectStore) -> bytes | None:
    """tokenizer.json of the checkpoint in this store, or None."""
    return store.read_bounded(TOKENIZER, MAX_TOKENIZER_BYTES) if store.exists(TOKENIZER) else None


def resolve(uri: str) -> str:
    """Where the checkpoint lies that `uri` names; a hub repository is downloaded first. RequestError, StorageError."""
    return _snapshot(uri) if uri.startswith(HUB) else uri


def _snapshot(uri: str) -> str:
    from huggingface_hub import errors, snapshot_download

    name, _, revision = uri.removeprefix(HUB).removeprefix("//").partition("@")
    try:
        path = snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES)
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        # A gated repository that we may not read is one that is not found.
        raise RequestError(_line(uri, error)) from error
    except OSError as error:  # what the hub answers, a cache without it, a disk that is full
        raise StorageError(_line(uri, error)) from error
    return Path(path).resolve().as_uri()


def _line(uri: str, error: Exception) -> str:
    """What the hub's client says, which may be a page, on one line."""
    return f"spec.model.uri: {uri}: {' '.join(str(error).split())}"
