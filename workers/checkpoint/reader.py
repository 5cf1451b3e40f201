"""A source checkpoint's tensors, read by ranges; each can be verified against the digest recorded for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from threading import Lock

import numpy as np
from torch import Tensor

from counterweight.workers.checkpoint.buffers import Bytes, allocate, check_booleans
from counterweight.workers.checkpoint.catalogue import Catalogue, naming
from counterweight.workers.checkpoint.decoding import decode
from counterweight.workers.checkpoint.digest import stacked_digest, tensor_digest
from counterweight.workers.checkpoint.encoding import EncodedWeight
from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.inspector import Inspector, TensorDigest
from counterweight.workers.checkpoint.ranges import MAX_READ, Read, plan_reads
from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.checkpoint.stacked import apart
from counterweight.workers.errors import CheckpointError, IntegrityError
from counterweight.workers.parallel import READERS, in_parallel
from counterweight.workers.storage.node_cache import NodeCache

BATCH_BYTES = READERS * MAX_READ
"""Of codes that are held at once, where no single encoded weight has more."""


Loaded = Callable[[str, Tensor], None]


def _nothing(name: str, tensor: Tensor) -> None:
    """What is done with a tensor that is not verified."""


class Checkpoint(Catalogue):
    """A checkpoint whose tensors can be read.

    Reading decodes an encoded weight; digests and finiteness are those of what it decodes to. Reads run in threads of their
    own, but one `Checkpoint` is for one caller at a time.
    """

    _node: NodeCache | None = None

    @contextmanager
    def shared(self, content: str) -> Iterator[None]:
        """While it is open, workers of this machine that share the same `content` read each range once, see `NodeCache`."""
        with NodeCache(self._store, content) as self._node:
            try:
                yield
            finally:
                self._node = None

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
        with naming(self._store.uri):
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
            found[name] = stacked_digest(self.entry(name).dtype, tensor.shape, [tensor])
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

            def decoded(
                weight: EncodedWeight, codes: dict[str, Tensor] = codes, scales: Mapping[str, Tensor] = scales
            ) -> Tensor:
                return decode(encoding, codes.pop(weight.codes.name), scales[weight.scales.name])

            for weight, tensor in zip(batch, in_parallel(decoded, batch), strict=True):
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
        source = self._store if self._node is None else self._node
        data = source.read_range(read.file, read.start, read.length) if read.length else b""
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
