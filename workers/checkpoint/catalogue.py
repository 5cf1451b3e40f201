"""A source checkpoint as its headers show it: opened and checked as a whole, without a tensor and without torch.

Nothing is taken on trust: what transformers accepts in silence (missing tensors, extra ones, an index that
points elsewhere, duplicate names) is an error here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from counterweight.workers.checkpoint.beside import SideFile, beside
from counterweight.workers.checkpoint.dtypes import DTYPES, StoredDtype
from counterweight.workers.checkpoint.encoding import Encoding
from counterweight.workers.checkpoint.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    header_length,
    parse_header,
)
from counterweight.workers.checkpoint.layout import INDEX, read_layout
from counterweight.workers.checkpoint.ranges import MAX_READ
from counterweight.workers.checkpoint.refusal import refusal, show
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError
from counterweight.workers.parallel import in_parallel
from counterweight.workers.storage import ObjectStore


class Catalogue:
    """A transformers checkpoint in safetensors whose headers have been read and agree with each other.

    config: config.json as parsed. asks_for_code: it named code of its repository, which is left out. names: of the tensors that
    it holds. An encoded weight (`block_scaled`, `mxfp4`) is one tensor, in bfloat16: dtype and shape are those of what it
    decodes to. parts: tensors that hold such a weight under other names -> what they are. bytes_read: bytes requested from the
    store so far. ours: it is of an artifact, whose bytes nobody changes. Picklable when the store is.

    Every method raises `CheckpointError`, naming file and tensor, where the checkpoint is not what it should
    be, and `StorageError` as the store does.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        config: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        bytes_read: int,
        encoding: Encoding | None = None,
        asks_for_code: bool = False,
        ours: bool = False,
    ) -> None:
        self._store, self._ours = store, ours
        self._shards = frozenset(entry.file for entry in entries.values())
        self._encoding = encoding
        self._encoded = {} if encoding is None else encoding.weights(entries)
        self._entries = {**entries, **{name: weight.decoded for name, weight in self._encoded.items()}}
        self.config = config
        self.asks_for_code = asks_for_code
        self.bytes_read = bytes_read
        self.parts: Mapping[str, str] = {k: v for weight in self._encoded.values() for k, v in weight.parts.items()}
        self.names: tuple[str, ...] = tuple(sorted(self._entries.keys() - self.parts.keys()))

    @classmethod
    def of_file(cls, store: ObjectStore, key: str) -> Self:
        """One safetensors file that we have written, without a config. Reads its header."""
        size = store.size(key)
        length = header_length(store.read_range(key, 0, min(LENGTH_BYTES, size)), file=key, file_size=size)
        header = parse_header(store.read_range(key, LENGTH_BYTES, length), file=key, file_size=size)
        return cls(store, config={}, entries=header.entries, bytes_read=LENGTH_BYTES + length, ours=True)

    @classmethod
    def open(cls, store: ObjectStore, *, quantized: bool = False) -> Self:
        """Reads the config, the index and the headers at the root of `store`, and no tensor.

        1. The config asks for nothing that is refused (`layout.check_config`).
        2. One safetensors file, or an index that names files beside itself (`layout.read_layout`).
        3. Every file exists and its header is strict (`header.parse_header`).
        4. The index and the headers have the same tensors in the same files, and no tensor twice.
        5. Where the config says that weights are encoded, each has its scales, and they fit.

        quantized: an artifact of ours is opened, whose config may say how its weights are quantized.
        """
        with naming(store.uri):
            layout = read_layout(store, quantized=quantized)
            lengths = _header_lengths(store, layout.shards)
            headers = _headers(store, lengths, DTYPES if layout.encoding is None else layout.encoding.dtypes)
            entries = _agreed(headers, layout.weight_map)
            header_bytes = sum(LENGTH_BYTES + length for _, length in lengths.values())
            return cls(
                store,
                config=layout.config,
                entries=entries,
                bytes_read=layout.bytes_read + header_bytes,
                encoding=layout.encoding,
                asks_for_code=layout.asks_for_code,
                ours=quantized,
            )

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor lies, its dtype and its shape. Of an encoded weight: those that it decodes to, and where its codes
        lie."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._store.uri}: no tensor {show(name)} in the checkpoint")
        return entry

    def expect(self, expected: Mapping[str, Sequence[int]], *, optional: Collection[str] = ()) -> None:
        """Raises `CheckpointError` listing every difference from the tensors that an architecture wants.

        expected: name -> shape, of floating-point tensors (F64, F32, F16 or BF16). optional: names that may
        be absent although expected (a tied head), or present although not (stored rotary frequencies; a
        vision tower), in any shape and dtype.
        """
        allowed = set(optional)
        problems = [
            f"tensor {show(name)}: missing, expected shape {list(shape)}"
            for name, shape in expected.items()
            if name not in self._entries and name not in allowed
        ]
        for name in self.names:
            entry, shape = self._entries[name], expected.get(name)
            where = f"{entry.file}: tensor {show(name)}"
            if shape is None:
                if name not in allowed:
                    problems.append(f"{where}: shape {list(entry.shape)}, expected no such tensor")
                continue
            if entry.shape != tuple(shape):
                problems.append(f"{where}: shape {list(entry.shape)}, expected {list(shape)}")
            if not entry.dtype.is_floating_point:
                problems.append(f"{where}: dtype {entry.dtype}, expected F64, F32, F16 or BF16")
        if problems:
            raise refusal(f"{self._store.uri}: not the tensors that the config's architecture has", problems)

    def beside(self) -> list[SideFile]:
        """What becomes of the files beside the weights."""
        return beside(self._store, self._shards)


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """Puts the checkpoint's URI in front of what the block refuses."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{uri}: {error}") from error


def _of_files(problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(problems[0]) if len(problems) == 1 else refusal("safetensors files", problems)


def _header_lengths(store: ObjectStore, shards: Sequence[str]) -> dict[str, tuple[int, int]]:
    """shard -> (file size, header length)."""

    def look(shard: str) -> tuple[int, int] | str:
        try:
            size = store.size(shard)
            prefix = store.read_range(shard, 0, min(size, LENGTH_BYTES)) if size else b""
            return size, header_length(prefix, file=shard, file_size=size)
        except ObjectNotFoundError:
            return f"{shard}: not found, but {INDEX} names it"
        except CheckpointError as error:
            return str(error)

    found = dict(zip(shards, in_parallel(look, shards), strict=True))
    problems = [outcome for outcome in found.values() if isinstance(outcome, str)]
    if problems:
        raise _of_files(problems)
    lengths = {shard: outcome for shard, outcome in found.items() if not isinstance(outcome, str)}
    total = sum(length for _, length in lengths.values())
    if total > MAX_HEADER_BYTES:  # the limit of one file holds for all together, and so does the memory it stands for
        raise CheckpointError(f"headers of {total} bytes in all, expected at most {MAX_HEADER_BYTES}")
    return lengths


def _headers(
    store: ObjectStore, lengths: Mapping[str, tuple[int, int]], dtypes: Mapping[str, StoredDtype]
) -> list[Mapping[str, TensorEntry]]:
    """Fetched side by side, parsed one after the other: so the limit on tensors holds for all files together."""
    headers: list[Mapping[str, TensorEntry]] = []
    problems: list[str] = []
    fetched = in_parallel(lambda shard: _header_bytes(store, shard, lengths[shard][1]), list(lengths))
    for shard, data in zip(lengths, fetched, strict=True):
        try:
            already = sum(map(len, headers))
            header = parse_header(data, file=shard, file_size=lengths[shard][0], already=already, dtypes=dtypes)
            headers.append(header.entries)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise _of_files(problems)
    return headers


def _header_bytes(store: ObjectStore, shard: str, length: int) -> bytearray:
    # In pieces: a store may hold what it reads twice, which for a hostile header would be 200 MB.
    header = bytearray(length)
    for begin in range(0, length, MAX_READ):
        count = min(MAX_READ, length - begin)
        header[begin : begin + count] = store.read_range(shard, LENGTH_BYTES + begin, count)
    return header


def _agreed(
    headers: Sequence[Mapping[str, TensorEntry]], weight_map: Mapping[str, str] | None
) -> dict[str, TensorEntry]:
    """The union of the headers, when no tensor is in two files and the index says the same."""
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for header in headers:
        for name, entry in header.items():
            first = entries.setdefault(name, entry)
            if first is not entry:
                problems.append(f"tensor {show(name)}: in both {first.file} and {entry.file}")
    if weight_map is not None:
        problems += [
            f"{shard}: tensor {show(name)}: named by {INDEX}, but not in the file"
            for name, shard in weight_map.items()
            if name not in entries or entries[name].file != shard
        ]
        problems += [
            f"{entry.file}: tensor {show(name)}: in the file, but not named by {INDEX}"
            for name, entry in entries.items()
            if name not in weight_map
        ]
    if problems:
        raise refusal("the files and the index disagree", problems)
    return entries
