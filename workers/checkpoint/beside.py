"""What becomes of the files beside a model's weights: tokenizer, templates, processors, licence; and what stays behind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Literal

from counterweight.workers.checkpoint.layout import CONFIG, INDEX, SINGLE
from counterweight.workers.config import Config
from counterweight.workers.storage import ObjectInfo, ObjectStore

USUAL = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
    ),
    *(
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "processor_config.json",
    ),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Files that transformers looks for: something else under one of these names is refused, where a listing would leave it out."""

MAX_FILES = 1000
"""Files of a folder that are looked at; a model's has some dozens."""

TEMPLATES = "additional_chat_templates"
"""The one folder below a model's that transformers reads."""

_NAME = re.compile(rf"({TEMPLATES}/)?[A-Za-z0-9_][A-Za-z0-9_. +-]{{0,120}}")
_CARRIED = re.compile(
    r".*\.(json|txt|jinja|model|tiktoken|vocab|spm|yaml|yml)|(license|licence|notice|copying|use_policy|usage_policy).*",
    re.IGNORECASE,
)
_LEFT_OUT = (
    (re.compile(r"readme(\..*)?", re.IGNORECASE), "says what the source is, and not what was made of it"),
    (re.compile(r".*\.(py|pyc|pyi|so|sh|js|ipynb|ps1|bat|exe|dll)", re.IGNORECASE), "code is never carried over"),
    (
        re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|pkl|h5|msgpack|onnx|gguf|npz|tflite|index\.json)", re.IGNORECASE),
        "weights, or an index of weights, that are not the model's",
    ),
    (re.compile(r"(artifact|ledger)\.json"), "a name of the artifact's own files"),
)


class SideFile(Config):
    """What became of one file, or of all in one folder, beside the source's weights. reason: why it was left out."""

    name: str
    fate: Literal["carried", "left out"]
    reason: str = ""


def beside(store: ObjectStore, shards: Iterable[str]) -> list[SideFile]:
    """Every file of a model's folder but its config, its index and its shards, in the order of their names. StorageError,
    RequestError for a pipe or a device in the place of a file that transformers looks for."""
    own = {CONFIG, INDEX, SINGLE, *shards}
    found: dict[str, SideFile] = {}
    listed = list(islice(store.list(), MAX_FILES + 1))
    for info in listed[:MAX_FILES]:
        if info.key not in own:
            entry = _entry(info)
            found[entry.name] = entry
    # Whatever else is in the folder, and asked by name: a listing shows no pipe.
    found |= {name: SideFile(name=name, fate="carried") for name in USUAL if name not in found and store.exists(name)}
    if len(listed) > MAX_FILES:
        rest = f"{listed[MAX_FILES].key} and what follows"
        found[rest] = SideFile(name=rest, fate="left out", reason=f"behind the first {MAX_FILES} files of the folder")
    return list(found.values())


def _entry(info: ObjectInfo) -> SideFile:
    name = info.key
    folder, _, base = name.rpartition("/")
    if folder and folder != TEMPLATES:
        top = folder.partition("/")[0]
        return SideFile(name=f"{top}/", fate="left out", reason="a folder that transformers does not read")
    for pattern, reason in _LEFT_OUT:
        if pattern.fullmatch(base):
            return SideFile(name=name, fate="left out", reason=reason)
    if _NAME.fullmatch(name) is None or _CARRIED.fullmatch(base) is None:
        return SideFile(name=name, fate="left out", reason="of no kind that a model is used with")
    return SideFile(name=name, fate="carried")
