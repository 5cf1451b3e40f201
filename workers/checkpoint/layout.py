"""Which files a checkpoint consists of, and whether its config and its index may be trusted to say so.

transformers takes `model.safetensors` when it is there and never looks at an index beside it; a tool that
prefers the index would read other weights from the same directory. So the two together are refused, unless
the index names no other file. An index may name files beside itself and nothing else: transformers follows
`../`.

A config may ask for code of its repository (`auto_map`), as DeepSeek's, MiniMax's and Kimi's do. No code is ever read,
copied or run. Where transformers has the family itself, the demand is dropped here, so that nobody behind sees it;
elsewhere it is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from counterweight.workers.checkpoint.block_scaled import BlockScaling
from counterweight.workers.checkpoint.encoding import Encoding
from counterweight.workers.checkpoint.header import MAX_TENSORS
from counterweight.workers.checkpoint.mxfp4 import Mxfp4
from counterweight.workers.checkpoint.refusal import refusal, show
from counterweight.workers.checkpoint.strict_json import parse_object
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError
from counterweight.workers.models.families import is_known
from counterweight.workers.storage import ObjectStore

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_CONFIG_BYTES = 4 << 20  # the largest in use name 20,000 classes in 1 MB
MAX_INDEX_BYTES = 32 << 20  # 91,000 tensors (DeepSeek-V3) take 9 MB
MAX_SHARDS = 4096  # the most in use: 770 (Grok-1)
_MAX_CONFIG_VALUES = 100_000
_MAX_INDEX_VALUES = MAX_TENSORS + 10_000  # the tensors and some metadata

# Narrow on purpose: no separator of any system, no drive, no scheme, no leading dot.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")

_PICKLES = re.compile(r".*\.(bin|bin\.index\.json|pt|pth|ckpt|pkl)")
_MAX_LOOKED_AT = 1000  # objects listed to tell a pickle checkpoint from no checkpoint

CODE = "auto_map"
QUANTIZED = (
    "the checkpoint is already quantized; expected one in 16 or 32 bit, in fp8 with scales of blocks, or in MXFP4"
)

_REFUSED_KEYS: Mapping[str, str] = {
    CODE: "the model needs code from its repository, which is never run",
    "transformers_weights": "the config redirects the weights to another file",
    "quantization_config": QUANTIZED,
    "compression_config": QUANTIZED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The checkpoint's files.

    config: config.json, parsed; without `quantization_config` where that is `encoding`, in which weights are decoded, and
    without `auto_map` where that is dropped, which `asks_for_code` says. shards: keys of its safetensors files, sorted.
    weight_map: tensor -> shard as the index has it, or None without an index. bytes_read: what finding out has cost.
    """

    config: Mapping[str, Any]
    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    bytes_read: int
    encoding: Encoding | None = None
    asks_for_code: bool = False


def read_layout(store: ObjectStore, *, quantized: bool = False) -> Layout:
    """Reads the config and the index. Raises `CheckpointError` where they break a rule, `StorageError` and
    `RequestError` as the store does."""
    config, config_bytes = _read_object(store, CONFIG, MAX_CONFIG_BYTES, _MAX_CONFIG_VALUES)
    encoding = None if quantized else _encoding(config)
    if encoding is not None:
        del config["quantization_config"]
    asks_for_code = not quantized and is_known(config.get("model_type")) and _drop_code(config)
    check_config(config, quantized=quantized)
    single = store.exists(SINGLE)
    if not store.exists(INDEX):
        if not single:
            raise _no_weights(store)
        return Layout(
            config=config,
            shards=(SINGLE,),
            weight_map=None,
            bytes_read=config_bytes,
            encoding=encoding,
            asks_for_code=asks_for_code,
        )
    index, index_bytes = _read_object(store, INDEX, MAX_INDEX_BYTES, _MAX_INDEX_VALUES)
    weight_map = check_index(index)
    shards = tuple(sorted(set(weight_map.values())))
    if single and shards != (SINGLE,):
        raise CheckpointError(
            f"{SINGLE} beside {INDEX} that names other files: expected only one of them, "
            "because which one holds the weights depends on the loader"
        )
    return Layout(
        config=config,
        shards=shards,
        weight_map=weight_map,
        bytes_read=config_bytes + index_bytes,
        encoding=encoding,
        asks_for_code=asks_for_code,
    )


def read_config(store: ObjectStore) -> Mapping[str, Any]:
    """config.json alone, as it stands. `CheckpointError`, `ObjectNotFoundError`, `StorageError`."""
    return _read_object(store, CONFIG, MAX_CONFIG_BYTES, _MAX_CONFIG_VALUES)[0]


def _encoding(config: Mapping[str, Any]) -> Encoding | None:
    if "quantization_config" not in config:
        return None
    try:
        return BlockScaling.of(config) or Mxfp4.of(config)
    except CheckpointError as error:
        raise CheckpointError(f"{CONFIG}: {error}") from error


def check_config(config: Mapping[str, Any], *, quantized: bool = False) -> None:
    """Raises `CheckpointError` when the config, at any depth, asks for what is refused: remote code, weights
    in another file, or an already quantized source."""
    problems = [
        f"{key}: {show(value)}: {_REFUSED_KEYS[key]}"
        for key, value in _members(config)
        if key in _REFUSED_KEYS and value is not None and not (quantized and key == "quantization_config")
    ]
    if problems:
        raise refusal(CONFIG, problems)


def check_index(index: Mapping[str, Any]) -> Mapping[str, str]:
    """The index's weight_map. Raises `CheckpointError` listing every entry that is no tensor -> file beside
    the index."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map: {show(weight_map)}, expected an object tensor -> file")
    problems = [
        f"weight_map: {show(name)}: {show(shard)}, expected a .safetensors file in the same directory"
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard)
    ]
    if problems:
        raise refusal(INDEX, problems)
    shards = len(set(weight_map.values()))
    if shards > MAX_SHARDS:
        raise CheckpointError(f"{INDEX}: weight_map names {shards} files, expected at most {MAX_SHARDS}")
    return weight_map


def _read_object(store: ObjectStore, key: str, max_bytes: int, max_values: int) -> tuple[dict[str, Any], int]:
    try:
        size = store.size(key)
    except ObjectNotFoundError as error:
        raise CheckpointError(f"{key}: not found, expected a transformers checkpoint") from error
    if size > max_bytes:
        raise CheckpointError(f"{key}: {size} bytes, expected at most {max_bytes}")
    # A range, not the object: what is read stays bounded when the object grows meanwhile.
    return parse_object(store.read_range(key, 0, size), file=key, max_values=max_values), size


def _drop_code(config: dict[str, Any]) -> bool:
    """Takes every `auto_map` out; whether there was one."""
    asking = [one for one in _objects(config) if one.get(CODE) is not None]
    for one in asking:
        del one[CODE]
    return bool(asking)


def _members(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every member of every object inside."""
    return (member for one in _objects(config) for member in one.items())


def _objects(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object inside: composite models nest one config in another."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _no_weights(store: ObjectStore) -> CheckpointError:
    found = (info.key for info in itertools.islice(store.list(), _MAX_LOOKED_AT))
    pickles = [key for key in found if _PICKLES.fullmatch(key)]
    if pickles:
        return CheckpointError(
            f"{show(pickles[0])}: a pickle, which can run code when it is read; expected {SINGLE} or {INDEX}"
        )
    return CheckpointError(f"neither {SINGLE} nor {INDEX} found")
