"""The files of a source model, looked at without torch: where they are, and whether they can be a model at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from counterweight.pipeline.manifest.uris import from_here
from counterweight.workers.calibration.chat_template import ChatTemplate
from counterweight.workers.calibration.encoder import MAX_TOKENIZER_BYTES
from counterweight.workers.calibration.windows import TokenizerFiles
from counterweight.workers.checkpoint.beside import beside
from counterweight.workers.checkpoint.layout import CONFIG, read_config, read_layout
from counterweight.workers.checkpoint.strict_json import parse_object
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError, RequestError, StorageError
from counterweight.workers.models.config_values import check_layers, check_values
from counterweight.workers.models.families import family_of
from counterweight.workers.storage import ObjectStore, open_store

HUB = "hf:"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

MAX_TEMPLATE_BYTES, MAX_TEMPLATE_VALUES = 8 << 20, 1_000_000
"""Of a file with a chat template, which may list thousands of added tokens too."""

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


def tokenizer_of(store: ObjectStore) -> TokenizerFiles | None:
    """The tokenizer of the checkpoint in this store; None without a tokenizer.json."""
    if not store.exists(TOKENIZER):
        return None
    tokenizer = store.read_bounded(TOKENIZER, MAX_TOKENIZER_BYTES)
    try:
        return TokenizerFiles(tokenizer, _chat_template(store))
    except CheckpointError as error:
        return TokenizerFiles(tokenizer, no_chat=str(error))  # texts need no template


def _chat_template(store: ObjectStore) -> ChatTemplate | None:
    """As transformers finds it: in a file of its own, or in tokenizer_config.json; of several the one called default.
    CheckpointError for a file that is no JSON."""
    config = _json(store, TOKENIZER_CONFIG)
    source: object = config.get("chat_template")
    if store.exists(CHAT_TEMPLATE):
        source = store.read_bounded(CHAT_TEMPLATE, MAX_TEMPLATE_BYTES).decode(errors="replace")
    elif isinstance(alone := _json(store, "chat_template.json").get("chat_template"), str):
        source = alone
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, Mapping)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    tokens = {name: _token(value) for name, value in config.items() if name.endswith("_token")}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


def _json(store: ObjectStore, name: str) -> Mapping[str, Any]:
    """An object beside the weights; an empty one where there is none."""
    if not store.exists(name):
        return {}
    return parse_object(store.read_bounded(name, MAX_TEMPLATE_BYTES), file=name, max_values=MAX_TEMPLATE_VALUES)


def _token(value: object) -> str | None:
    """A special token's text, which tokenizer_config.json has as it is or with how it is matched."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def config_of(model: str) -> Mapping[str, Any]:
    """The config.json of a model, of which no other file is fetched. model: a path or a URI. RequestError and its kinds,
    StorageError."""
    uri = from_here(model)
    if not uri.startswith(HUB):
        return read_config(open_store(uri))
    from huggingface_hub import hf_hub_download

    name, revision = hub_name(uri)
    with hub_answers(uri, "model"):
        path = Path(hf_hub_download(name, CONFIG, revision=revision))
    return read_config(open_store(path.parent.resolve().as_uri()))


def positions_of(config: Mapping[str, object]) -> int | None:
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


def resolve(uri: str, field: str = "spec.model.uri") -> str:
    """Where the checkpoint or artifact lies that `uri` names; a hub repository is downloaded first. field: what messages call
    it. RequestError, StorageError."""
    return _snapshot(uri, field) if uri.startswith(HUB) else uri


def _snapshot(uri: str, field: str) -> str:
    from huggingface_hub import snapshot_download

    name, revision = hub_name(uri)
    with hub_answers(uri, field):
        path = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES)
    return Path(path).resolve().as_uri()


def hub_name(uri: str) -> tuple[str, str | None]:
    """Repository and revision."""
    name, _, revision = uri.removeprefix(HUB).removeprefix("//").partition("@")
    return name, revision or None


@contextmanager
def hub_answers(uri: str, field: str) -> Iterator[None]:
    """RequestError and StorageError in the place of what the hub's client raises."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # which says no more than that there is no way to the hub
        raise StorageError(_line(uri, error, field)) from error
    except (
        errors.HFValidationError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    ) as error:
        # A gated repository that we may not read is one that is not found.
        raise RequestError(_line(uri, error, field)) from error
    except errors.HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (400, 401, 403)
        raise (RequestError if refused else StorageError)(_line(uri, error, field)) from error
    except Exception as error:
        # No way to the hub, a cache without it, a disk that is full; the first is an error of the library for HTTP, of whose
        # class those of the hub are, whichever library that is.
        if not isinstance(error, (OSError, *errors.HfHubHTTPError.__bases__)):
            raise
        raise StorageError(_line(uri, error, field)) from error


def _line(uri: str, error: Exception, field: str) -> str:
    """What the hub's client says, which may be a page, on one line."""
    return f"{field}: {uri}: {' '.join(str(error).split())}"
