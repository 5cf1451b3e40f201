"""Checkpoints, right and wrong, for the tests of the reader and for the attacks on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterweight.workers.checkpoint import Checkpoint, serialize_safetensors
from counterweight.workers.checkpoint.buffers import TORCH_DTYPES
from counterweight.workers.checkpoint.dtypes import DTYPES
from counterweight.workers.storage.file import FileStore

INDEX = "model.safetensors.index.json"

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header (JSON-encoded unless it is bytes) and any claimed header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def field(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Finite values of any dtype of the format."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def every_dtype(rows: int = 3) -> dict[str, Tensor]:
    """A tensor [rows, 5] of each dtype, by the format's word."""
    return {word: random_tensor(TORCH_DTYPES[word], (rows, 5)) for word in DTYPES}


def write_checkpoint(
    root: Path, shards: Mapping[str, Mapping[str, Tensor] | bytes], *, config: Any = None, index: Any = None
) -> FileStore:
    """Writes config.json, the files of `shards` (bytes as they are), and `index` as the index unless it is
    None.

    `config` and `index` are JSON-encoded unless they are bytes.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_bytes(encoded({"model_type": "llama"} if config is None else config))
    for name, content in shards.items():
        data = content if isinstance(content, bytes) else serialize_safetensors(content)
        (root / name).write_bytes(data)
    if index is not None:
        (root / INDEX).write_bytes(encoded(index))
    return FileStore(root)


def index_of(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The index that names every tensor of `shards`."""
    return {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}


def encoded(value: Any) -> bytes:
    """`value` as JSON, or as it is when it is bytes."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def bits(tensor: Tensor) -> bytes:
    """The tensor's elements as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def open_single(root: Path, tensors: Mapping[str, Tensor] | bytes) -> Checkpoint:
    """A checkpoint of one file."""
    return Checkpoint.open(write_checkpoint(root, {"model.safetensors": tensors}))


class RecordingStore(FileStore):
    """A file store that notes every range read (key, start, length) and passes the bytes through `tamper`."""

    def __init__(self, root: Path, tamper: Callable[[bytes], bytes] = lambda data: data) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int, int]] = []
        self.tamper = tamper

    def read_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append((key, start, length))
        return self.tamper(super().read_range(key, start, length))
