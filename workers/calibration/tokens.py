"""Token sets: windows of token ids cut from a source, the same on every machine, known by their digest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from counterweight.workers.calibration.source import (
    DatasetSource,
    StandardLibrarySource,
    TextSource,
    TokenSource,
    TokensSource,
)
from counterweight.workers.calibration.standard_library import standard_library_text
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.checkpoint.writer import read_safetensors
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError, RequestError
from counterweight.workers.storage import open_store, split_uri

Sampling = Literal["consecutive", "random"]


@dataclass(frozen=True, slots=True)
class TokenSet:
    """ids: [sequences, length] int32, on the CPU."""

    ids: Tensor

    @property
    def digest(self) -> str:
        """sha256 (hex) of dtype, shape and values."""
        return tensor_digest(self.ids)

    @property
    def sequences(self) -> int:
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TokenSet:
        """Windows of equal length, given as numbers."""
        return cls(torch.tensor(rows, dtype=torch.int32))

    def within(self, vocabulary: int, field: str) -> TokenSet:
        """Itself; RequestError, naming `field` of the manifest, when an id is not below the model's `vocabulary`."""
        lowest, highest = int(self.ids.min()), int(self.ids.max())
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise RequestError(f"{field}: token id {wrong}: expected ids from 0 to {vocabulary - 1} (config.json)")
        return self


def token_set(
    source: TokenSource,
    tokenizer: bytes | None,
    *,
    length: int,
    sequences: int | None,
    sampling: Sampling,
    seed: int,
    field: str,
) -> TokenSet:
    """Windows of `length` tokens.

    tokenizer: the model's tokenizer.json; not needed for prepared tokens.
    sequences: how many windows; None for as many non-overlapping ones as there are. sampling: consecutive windows from
    the start, or windows at random offsets (`random.Random(seed)`, overlaps possible).
    field: where the source stands in the manifest, for messages. RequestError when there is too little text or no
    tokenizer, or an id that no model has. Whether ids are the model's is for `TokenSet.within` to say.
    """
    if isinstance(source, TokensSource):
        ids = _prepared(source, length, sequences, field)
    else:
        stream = _tokenize(_text(source, field), tokenizer, field)
        ids = _cut(stream, length, sequences, sampling, seed, field)
    # A number that wraps around could come out as a token of the model's.
    bounds = torch.iinfo(torch.int32)
    for extreme in (int(ids.min()), int(ids.max())):
        if not bounds.min <= extreme <= bounds.max:
            raise RequestError(f"{field}: token id {extreme}: expected ids that fit in 32 bits")
    return TokenSet(ids.to(torch.int32).contiguous())


def _text(source: TextSource | StandardLibrarySource | DatasetSource, field: str) -> str:
    if isinstance(source, StandardLibrarySource):
        return standard_library_text(source.part, source.content)
    if isinstance(source, TextSource):
        data = _read(source.uri, field)
        try:
            # Line ends as Python reads text: a file with CRLF gives the tokens that every other tool gets from it.
            return data.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"{field}: {source.uri}: not UTF-8 text at byte {error.start}") from error
    return _dataset_text(source, field)


def _read(uri: str, field: str) -> bytes:
    root, key = split_uri(uri)
    try:
        return open_store(root).read(key)
    except ObjectNotFoundError as error:
        raise RequestError(f"{field}.uri: {uri}: no such file") from error


def _dataset_text(source: DatasetSource, field: str) -> str:
    import datasets  # costs a second that other sources need not pay

    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split)
    except (ValueError, OSError, KeyError) as error:
        raise RequestError(f"{field}: dataset {source.path!r}: {error}") from error
    if source.column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise RequestError(f"{field}.column: {source.column!r}: expected one of {columns}")
    if source.rows is not None:
        rows = rows.select(range(min(source.rows, len(rows))))
    return "\n\n".join(rows[source.column])


def _tokenize(text: str, tokenizer: bytes | None, field: str) -> list[int]:
    if tokenizer is None:
        raise RequestError(f"{field}: the model has no tokenizer.json: expected one, or a source of kind 'tokens'")
    try:
        encoder = Tokenizer.from_buffer(tokenizer)
    except ValueError as error:
        raise RequestError(f"tokenizer.json: {error}") from error
    encoder.no_truncation()
    encoder.no_padding()
    ids: list[int] = encoder.encode(text).ids
    return ids


def _cut(stream: list[int], length: int, sequences: int | None, sampling: Sampling, seed: int, field: str) -> Tensor:
    available = len(stream) // length
    wanted = available if sequences is None else sequences
    if available < max(wanted, 1):
        raise RequestError(
            f"{field}: {len(stream)} tokens make {available} windows of {length}: expected at least {max(wanted, 1)}"
        )
    if sampling == "consecutive":
        starts = [index * length for index in range(wanted)]
    else:
        draw = random.Random(seed)
        starts = [draw.randrange(len(stream) - length + 1) for _ in range(wanted)]
    return torch.tensor([stream[start : start + length] for start in starts])


def _prepared(source: TokensSource, length: int, sequences: int | None, field: str) -> Tensor:
    data = _read(source.uri, field)
    try:
        tensors = read_safetensors(data, file=source.uri)
    except CheckpointError as error:
        raise RequestError(f"{field}: {error}") from error
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise RequestError(f"{field}: {source.uri}: expected an int32 or int64 tensor input_ids [sequences, length]")
    wanted = ids.shape[0] if sequences is None else sequences
    if ids.shape[0] < wanted or ids.shape[1] != length or ids.numel() == 0:
        raise RequestError(f"{field}: {source.uri}: input_ids {list(ids.shape)}: expected [{wanted}, {length}]")
    return ids[:wanted]
