"""Token sets: windows of token ids cut from a source, the same on every machine, known by their digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from counterweight.workers.calibration.source import SpecialTokens, TokenSource, TokensSource
from counterweight.workers.calibration.texts import open_text
from counterweight.workers.calibration.windows import AnyTokenizer, Sampling, Windows, encoder, windows
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.checkpoint.writer import read_safetensors
from counterweight.workers.errors import CheckpointError, RequestError

MAX_PREPARED_BYTES = 8 << 30
"""Of a file of prepared tokens: a thousand million of them."""


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
    tokenizer: AnyTokenizer,
    *,
    length: int,
    sequences: int | None,
    sampling: Sampling,
    seed: int,
    field: str,
    further: Sequence[int] = (),
    special_tokens: SpecialTokens = "text",
) -> TokenSet:
    """Windows of `length` tokens.

    tokenizer: the model's; not needed for prepared tokens.
    sequences: how many windows; None for as many non-overlapping ones as there are. sampling: consecutive windows from
    the start, or windows at random offsets (`random.Random(seed)`, overlaps possible). further: behind these, so many windows
    of each kind that share no token with those before, or as many as there are. special_tokens: what begins with the
    tokenizer's token for a beginning, the text or each window; of prepared tokens nothing is changed.
    field: where the source stands in the manifest, for messages. RequestError when there is too little text or no
    tokenizer, or an id that no model has. Whether ids are the model's is for `TokenSet.within` to say.
    """
    if isinstance(source, TokensSource):
        ids = _prepared(source, length, sequences, field, sum(further))
    else:
        with encoder(tokenizer, field) as running:
            found = windows(
                source,
                running,
                length=length,
                sequences=sequences,
                sampling=sampling,
                seed=seed,
                field=field,
                further=further,
                special_tokens=special_tokens,
            )
        ids = as_tensor(found)
    return checked(ids, field)


def as_tensor(found: Windows) -> Tensor:
    """[sequences, length] int64."""
    return torch.from_numpy(np.array(found, dtype=np.int64))


def checked(ids: Tensor, field: str) -> TokenSet:
    """A token set of ids [sequences, length]; RequestError for one that could come out as another when it wraps around."""
    bounds = torch.iinfo(torch.int32)
    for extreme in (int(ids.min()), int(ids.max())):
        if not bounds.min <= extreme <= bounds.max:
            raise RequestError(f"{field}: token id {extreme}: expected ids that fit in 32 bits")
    return TokenSet(ids.to(torch.int32).contiguous())


def _prepared(source: TokensSource, length: int, sequences: int | None, field: str, further: int) -> Tensor:
    store, key, size = open_text(source.uri, field)
    if size > MAX_PREPARED_BYTES:
        raise RequestError(f"{field}: {source.uri}: {size} bytes, expected at most {MAX_PREPARED_BYTES}")
    try:
        tensors = read_safetensors(store.read(key), file=source.uri)
    except CheckpointError as error:
        raise RequestError(f"{field}: {error}") from error
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise RequestError(f"{field}: {source.uri}: expected an int32 or int64 tensor input_ids [sequences, length]")
    wanted = ids.shape[0] if sequences is None else sequences
    if ids.shape[0] < wanted or ids.shape[1] != length or ids.numel() == 0:
        raise RequestError(f"{field}: {source.uri}: input_ids {list(ids.shape)}: expected [{wanted}, {length}]")
    return ids[: wanted + further]
