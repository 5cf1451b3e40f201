"""A source checkpoint: opened by its headers alone, checked as a whole, then read tensor by tensor.

Nothing is taken on trust: what transformers accepts in silence (missing tensors, extra ones, an index that
points elsewhere, duplicate names) is an error here, and every tensor can be verified against the digest
recorded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterweight.workers.checkpoint.beside import SideFile, beside
from counterweight.workers.checkpoint.buffers import Bytes, allocate, check_booleans
from counterweight.workers.checkpoint.digest import Inspector, TensorDigest, tensor_digest
from counterweight.workers.checkpoint.encoding import EncodedWeight, Encoding
from counterweight.workers.checkpoint.header import (
    DTYPES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    dtype_word,
    header_length,
    parse_header,
)
from counterweight.workers.checkpoint.layout import INDEX, read_layout
from counterweight.workers.checkpoint.ranges import MAX_READ, Read, plan_reads
from counterweight.workers.checkpoint.refusal import refusal, show
from counterweight.workers.checkpoint.stacked import apart, stacked_digest
from counterweight.workers.errors import CheckpointError, IntegrityError, ObjectNotFoundError
from counterweight.workers.parallel import READERS, in_parallel
from counterweight.workers.storage import ObjectStore

BATCH_BYTES = READERS * MAX_READ
"""Of codes that are held at once, where no single encoded weight has more."""


Loaded = Callable[[str, Tensor], None]


def _nothing(name: str, tensor: Tensor) -> None:
    """What is done with a tensor that is not verified."""


class Checkpoint:
    """A transformers checkpoint in safetensors whose headers have been read and agree with each other.

    config: config.json as parsed. asks_for_code: it named code of its repository, which is left out. names: of the tensors that
    it holds. An encoded weight (`block_scaled`, `mxfp4`) is one tensor, in bfloat16: reading decodes it; digests, finiteness,
    dtype and shape are those of what it decodes to. parts: tensors that hold such a weight under other names -> what they are.
    bytes_read: bytes requested from the store so far. ours: it is of an artifact, whose bytes nobody changes. Picklable when
    the store is; reads run in threads of their own, but one `Checkpoint` is for one caller at a time.

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
    def open(cls, store: ObjectStore, *, quantized: bool = False) -> Checkpoint:
        """Reads the config, the index and the headers at the root of `store`, and no tensor.

        1. The config asks for nothing that is refused (`layout.check_config`).
        2. One safetensors file, or an index that names files beside itself (`layout.read_layout`).
        3. Every file exists and its header is strict (`header.parse_header`).
        4. The index and the headers have the same tensors in the same files, and no tensor twice.
        5. Where the config says that weights are encoded, each has its scales, and they fit.

        quantized: an artifact of ours is opened, whose config may say how its weights are quantized.
        """
        with _naming(store.uri):
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
                word = dtype_word(entry.dtype, where=where)
                problems.append(f"{where}: dtype {word}, expected F64, F32, F16 or BF16")
        if problems:
            raise refusal(f"{self._store.uri}: not the tensors that the config's architecture has", problems)

    def read(self, name: str, *, sha256: str | None = None) -> Tensor:
        """One tensor on the CPU, in memory of its own; `sha256` as for `read_many`."""
        return self.read_many([name], sha256=None if sha256 is None else {name: sha256})[name]

    def read_many(self, names: Iterable[str], *, sha256: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """The tensors by name, on the CPU, each in memory of its own; neighbours share requests.

        sha256: the digests recorded for all of `names` (`digest`, `inspect`). A tensor that differs is read
        once more. When the same wrong bytes come again, the source has changed since: `CheckpointError`. When
        others come, the storage cannot be relied on: `IntegrityError`, and a retry makes sense.
        """
        entries = self._wanted(names, sha256)
        digests: dict[str, str] = {}

        def verify(name: str, tensor: Tensor) -> None:
            digests[name] = tensor_digest(tensor)

        tensors = self._load(entries, _nothing if sha256 is None else verify)
        if sha256 is not None:
            decoded = [entry.name for entry in entries if entry.name not in digests]
            digests.update(zip(decoded, in_parallel(tensor_digest, [tensors[name] for name in decoded]), strict=True))
            for entry in entries:
                if (digest := digests[entry.name]) != sha256[entry.name]:
                    tensors[entry.name] = self._reread(entry, digest, sha256[entry.name])
        with _naming(self._store.uri):
            for entry in entries:
                check_booleans(entry, tensors[entry.name])
        return tensors

    def read_apart(self, names: Iterable[str], *, sha256: Mapping[str, str] | None = None) -> dict[str, list[Tensor]]:
        """Tensors [n, ...] by name, each as the n tensors on its first axis in memory of their own; the whole is nowhere.

        sha256: of the whole ones, as for `read_many`.
        """
        entries = self._wanted(names, sha256)
        found = {entry.name: self._load_apart(entry) for entry in entries}

        def digest(entry: TensorEntry) -> str:
            return stacked_digest(entry.dtype, entry.shape, found[entry.name]).sha256

        if sha256 is not None:
            for entry, first in zip(entries, in_parallel(digest, entries), strict=True):
                if first != (expected := sha256[entry.name]):
                    found[entry.name] = self._load_apart(entry)
                    self._check_again(entry, first, digest(entry), expected)
        return found

    def digest(self, name: str) -> str:
        """The sha256 (hex) of a tensor's dtype, shape and bytes; `workers.checkpoint.digest` says how."""
        return self.inspect([name])[name].sha256

    def inspect(self, names: Iterable[str]) -> dict[str, TensorDigest]:
        """Digest and finiteness of each tensor, by name, from one pass over its bytes.

        Bounded memory: `READERS` pieces of at most `ranges.MAX_READ` bytes are held, and no tensor; of encoded weights
        as many bytes of codes (or one matrix that is larger) and what they decode to.
        """
        entries = [self.entry(name) for name in dict.fromkeys(names)]
        groups = plan_reads(entry for entry in entries if entry.name not in self._encoded)
        found: dict[str, TensorDigest] = {}
        encoded = [self._encoded[entry.name] for entry in entries if entry.name in self._encoded]
        for weight in encoded:
            if weight.stacked:
                parts = (part for _, part in self._decoded(weight.apart()))
                found[weight.decoded.name] = stacked_digest(weight.decoded.dtype, weight.decoded.shape, parts)
        for name, tensor in self._decoded([weight for weight in encoded if not weight.stacked]):
            found[name] = stacked_digest(tensor.dtype, tensor.shape, [tensor])
        for group, digests in zip(groups, in_parallel(self._inspect_group, groups), strict=True):
            found.update(digests)
            self.bytes_read += sum(read.length for read in group)
        return {entry.name: found[entry.name] for entry in entries}

    def _wanted(self, names: Iterable[str], sha256: Mapping[str, str] | None) -> list[TensorEntry]:
        """Entries of these tensors, once each; CheckpointError for one without a recorded digest."""
        entries = [self.entry(name) for name in dict.fromkeys(names)]
        for entry in entries:
            if sha256 is not None and entry.name not in sha256:
                raise CheckpointError(f"{self._store.uri}: no sha256 recorded for tensor {show(entry.name)}")
        return entries

    def beside(self) -> list[SideFile]:
        """What becomes of the files beside the weights."""
        return beside(self._store, self._shards)

    def _load(self, entries: Sequence[TensorEntry], loaded: Loaded) -> dict[str, Tensor]:
        """loaded: see `_load_stored`; not called of encoded weights."""
        tensors = self._load_stored([entry for entry in entries if entry.name not in self._encoded], loaded)
        tensors.update(self._decoded([self._encoded[entry.name] for entry in entries if entry.name in self._encoded]))
        return tensors

    def _load_apart(self, entry: TensorEntry) -> list[Tensor]:
        if entry.name in self._encoded:
            return [part.squeeze(0) for _, part in self._decoded(self._encoded[entry.name].apart())]
        parts = apart(entry)
        loaded = self._load_stored(parts)
        return [loaded[part.name].squeeze(0) for part in parts]

    def _decoded(self, weights: Iterable[EncodedWeight]) -> Iterator[tuple[str, Tensor]]:
        """Encoded weights by name, decoded batch by batch: `BATCH_BYTES` of codes, or one weight that is larger."""
        if (encoding := self._encoding) is None:
            return
        for batch in _batches(weights):
            codes = self._load_stored([weight.codes for weight in batch])
            scales = self._load_stored([weight.scales for weight in batch])

            def decode(
                weight: EncodedWeight, codes: dict[str, Tensor] = codes, scales: Mapping[str, Tensor] = scales
            ) -> Tensor:
                return encoding.decode(codes.pop(weight.codes.name), scales[weight.scales.name])

            for weight, tensor in zip(batch, in_parallel(decode, batch), strict=True):
                yield weight.decoded.name, tensor

    def _load_stored(self, entries: Sequence[TensorEntry], loaded: Loaded = _nothing) -> dict[str, Tensor]:
        """loaded: called with each tensor as soon as it is whole, by one of the threads that read, while others go on."""
        allocated = {entry.name: allocate(entry) for entry in entries}
        groups = plan_reads(entries)
        missing, lock = [len(group) for group in groups], Lock()

        def fill(piece: tuple[int, Read]) -> int:
            group, read = piece
            data = self._fetch(read)
            for part in read.parts:
                target = allocated[part.entry.name][1][part.offset : part.offset + part.length]
                target[:] = data[part.position : part.position + part.length]
            with lock:
                missing[group] -= 1
                whole = not missing[group]
            for part in read.parts if whole else ():
                loaded(part.entry.name, allocated[part.entry.name][0])
            return read.length

        for length in in_parallel(fill, [(place, read) for place, group in enumerate(groups) for read in group]):
            self.bytes_read += length
        return {name: tensor for name, (tensor, _) in allocated.items()}

    def _reread(self, entry: TensorEntry, first: str, expected: str) -> Tensor:
        tensor = self._load([entry], _nothing)[entry.name]
        self._check_again(entry, first, tensor_digest(tensor), expected)
        return tensor

    def _check_again(self, entry: TensorEntry, first: str, second: str, expected: str) -> None:
        """Raises as `read_many` says unless the second reading has what is expected."""
        if second == expected:
            return
        problem = f"{entry.file}: tensor {show(entry.name)}: sha256 {second}, expected {expected}"
        if second == first and self._ours:
            raise IntegrityError(f"{self._store.uri}: {problem}: not the bytes that were written")
        if second == first:
            raise CheckpointError(f"{self._store.uri}: {problem}: the source changed while the job ran")
        raise IntegrityError(f"{self._store.uri}: {problem}: two reads gave different bytes")

    def _inspect_group(self, group: tuple[Read, ...]) -> dict[str, TensorDigest]:
        inspectors: dict[str, Inspector] = {}
        for read in group:
            data = self._fetch(read)
            for part in read.parts:
                name = part.entry.name
                if name not in inspectors:
                    inspectors[name] = Inspector(part.entry.dtype, part.entry.shape)
                inspectors[name].update(data[part.position : part.position + part.length])
        return {name: inspector.result() for name, inspector in inspectors.items()}

    def _fetch(self, read: Read) -> Bytes:
        # Not every store has a range of no bytes.
        data = self._store.read_range(read.file, read.start, read.length) if read.length else b""
        return np.frombuffer(data, dtype=np.uint8)


def _batches(weights: Iterable[EncodedWeight]) -> Iterator[list[EncodedWeight]]:
    """Neighbours together, at most `BATCH_BYTES` of codes or one weight."""
    batch: list[EncodedWeight] = []
    size = 0
    for weight in sorted(weights, key=attrgetter("codes.file", "codes.start")):
        if batch and size + weight.codes.length > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(weight)
        size += weight.codes.length
    if batch:
        yield batch


@contextmanager
def _naming(uri: str) -> Iterator[None]:
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
    store: ObjectStore, lengths: Mapping[str, tuple[int, int]], dtypes: Mapping[str, torch.dtype]
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
