"""Safetensors files, written tensor by tensor; and small ones, as bytes.

The bytes are a function of names, values and metadata alone: tensors in the safetensors library's own order
(dtypes as in `dtypes.DTYPES`, widest first, then names), the header padded with spaces to a multiple of
eight. For one metadata key the file is the library's, byte for byte; it writes several keys in no fixed
order, here they are sorted.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from counterweight.workers.checkpoint.buffers import allocate, check_booleans, flat_bytes, stored_dtype
from counterweight.workers.checkpoint.dtypes import DTYPES, StoredDtype
from counterweight.workers.checkpoint.header import (
    LENGTH_BYTES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_METADATA_BYTES,
    MAX_TENSORS,
    METADATA,
    check_name,
    header_length,
    parse_header,
)
from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.errors import CheckpointError, IntegrityError
from counterweight.workers.storage import ObjectStore, Written

PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""What transformers wants to find in a file that torch wrote."""


def write_safetensors(
    store: ObjectStore, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = PT_METADATA
) -> Written:
    """Writes `tensors` as one object, and returns its size and its sha256, computed on the way.

    Streams: what is held beside the tensors is at most a copy of one of them (when it is on a GPU or not
    contiguous). Views are written as what they show; tensors that share memory are each written whole.
    Nothing is visible under `key` unless everything was written.

    Raises `CheckpointError` for what a strict reader would refuse (names, dtypes, sparse or meta tensors),
    before the first byte; `IntegrityError` when the store counted other bytes than were handed over;
    `StorageError` as the store does.
    """
    layout = _layout(tensors, file=key)
    with TurnWriter(store, key, layout, metadata) as file:
        for tensor in _in_turn(layout, tensors):
            file.write(tensor)
        return file.commit()


Layout = Mapping[str, tuple[StoredDtype, tuple[int, ...]]]
"""Tensor -> its dtype and shape."""


def writing_order(layout: Layout) -> list[str]:
    """Names as a file has them."""
    ranks = {word: rank for rank, word in enumerate(DTYPES)}
    return sorted(layout, key=lambda name: (ranks[layout[name][0].word], name))


class TurnWriter:
    """A safetensors file that is written tensor by tensor, in `writing_order`; nothing is visible before `commit`.

    A context manager, as `Writer` is, and raises as it does; IntegrityError for a tensor that is not what `layout` says, and
    for a file that is not whole.
    """

    def __init__(self, store: ObjectStore, key: str, layout: Layout, metadata: Mapping[str, str] = PT_METADATA) -> None:
        self._plan, self._layout = _plan(layout, metadata, file=key), layout
        self._count = 0
        self._writer = store.open_writer(key)
        try:
            self._writer.write(self.header)
        except BaseException:
            self.abort()
            raise

    @property
    def header(self) -> bytes:
        """What the file begins with: the header, with its length in front."""
        return self._plan.header

    @property
    def left(self) -> Sequence[str]:
        """Names of the tensors that are to be written yet, in order."""
        return self._plan.names[self._count :]

    def write(self, tensor: Tensor) -> None:
        """The next one."""
        name = self._plan.names[self._count]
        found = (_dtype_of(name, tensor, file=self._writer.uri), tuple(tensor.shape))
        if found != self._layout[name]:
            raise IntegrityError(f"tensor {show(name)}: {found}, expected {self._layout[name]}")
        flat = flat_bytes(tensor)
        if flat.size:
            self._writer.write(flat.data)
        self._count += 1

    def commit(self) -> Written:
        """Makes the file visible, whole."""
        if self.left:
            raise IntegrityError(
                f"write {self._writer.uri}: {len(self.left)} of {len(self._layout)} tensors are missing"
            )
        written = self._writer.commit()
        if written.size != self._plan.size:
            raise IntegrityError(f"write {self._writer.uri}: {written.size} bytes written, expected {self._plan.size}")
        return written

    def abort(self) -> None:
        """Discards what is written; does nothing after `commit`."""
        self._writer.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def header_bytes(layout: Layout, metadata: Mapping[str, str] = PT_METADATA) -> bytes:
    """What a file of these tensors begins with: the header, with its length in front."""
    return _plan(layout, metadata, file="safetensors bytes").header


def _in_turn(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for name in writing_order(layout):
        yield tensors[name]


def serialize_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = PT_METADATA) -> bytes:
    """The bytes that `write_safetensors` writes, for files that fit in memory. Raises `CheckpointError`
    likewise."""
    buffer = io.BytesIO()
    for piece in safetensors_pieces(tensors, metadata):
        buffer.write(piece)
    return buffer.getvalue()


def safetensors_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = PT_METADATA
) -> Iterator[memoryview]:
    """The bytes that `write_safetensors` writes, piece by piece, for a caller that hashes or sends them
    itself.

    A piece is valid until the next one is taken. Raises `CheckpointError` likewise.
    """
    layout = _layout(tensors, file="safetensors bytes")
    yield from _pieces(_plan(layout, metadata, file="safetensors bytes"), _in_turn(layout, tensors))


def read_safetensors(data: bytes, *, file: str = "safetensors bytes") -> dict[str, Tensor]:
    """The tensors of a whole safetensors file, each in memory of its own.

    `file` names it in errors. Raises `CheckpointError` for whatever `header.parse_header` refuses.
    """
    length = header_length(data[:LENGTH_BYTES], file=file, file_size=len(data))
    header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], file=file, file_size=len(data))
    everything = np.frombuffer(data, dtype=np.uint8)
    tensors: dict[str, Tensor] = {}
    for entry in header.entries.values():
        tensor, flat = allocate(entry)
        flat[:] = everything[entry.start : entry.start + entry.length]
        check_booleans(entry, tensor)
        tensors[entry.name] = tensor
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """names: in writing order. header: with its length in front. size: of the whole file."""

    names: tuple[str, ...]
    header: bytes
    size: int


def _layout(tensors: Mapping[str, Tensor], *, file: str) -> Layout:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{file}: tensor {show(name)}: {tensor.layout} on {tensor.device}, expected a dense tensor that has its data"
            )
    return {name: (_dtype_of(name, tensor, file=file), tuple(tensor.shape)) for name, tensor in tensors.items()}


def _dtype_of(name: str, tensor: Tensor, *, file: str) -> StoredDtype:
    return stored_dtype(tensor.dtype, where=f"{file}: tensor {show(name)}")


def _plan(layout: Layout, metadata: Mapping[str, str], *, file: str) -> _Plan:
    if len(layout) > MAX_TENSORS:
        raise CheckpointError(f"{file}: {len(layout)} tensors, expected at most {MAX_TENSORS}")
    for name, (_, shape) in layout.items():
        _check(name, shape, file=file)
    names = tuple(writing_order(layout))
    members: dict[str, object] = {}
    if metadata:
        members[METADATA] = dict(sorted(metadata.items()))
        if len(_json(members[METADATA])) > MAX_METADATA_BYTES:
            raise CheckpointError(f"{file}: {METADATA}, expected at most {MAX_METADATA_BYTES} bytes")
    position = 0
    for name in names:
        dtype, shape = layout[name]
        end = position + math.prod(shape) * dtype.itemsize
        members[name] = {"dtype": dtype.word, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = _json(members)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header of {len(text)} bytes, expected at most {MAX_HEADER_BYTES}")
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return _Plan(names=names, header=header, size=len(header) + position)


def _check(name: str, shape: tuple[int, ...], *, file: str) -> None:
    check_name(name, file=file)
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{file}: tensor {show(name)}: {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}"
        )


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _pieces(plan: _Plan, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(plan.header)
    for tensor in tensors:
        flat = flat_bytes(tensor)
        if flat.size:
            yield flat.data
