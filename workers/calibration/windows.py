"""Windows of token ids out of a text, as numbers: without torch, so that a wrong text is told before anything else starts."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Literal, TypeAlias

from counterweight.workers.calibration.encoder import Encoder
from counterweight.workers.calibration.source import DatasetSource, StandardLibrarySource, TextSource
from counterweight.workers.calibration.texts import pieces_of
from counterweight.workers.errors import RequestError

Sampling = Literal["consecutive", "random"]

Windows: TypeAlias = "list[array[int]]"
"""Token ids, one array for each window; all of one length."""


def encoder(tokenizer: bytes | None, field: str) -> Encoder:
    """The model's tokenizer, running; RequestError, naming `field`, without a tokenizer.json."""
    if tokenizer is None:
        raise RequestError(f"{field}: the model has no tokenizer.json: expected one, or a source of kind 'tokens'")
    return Encoder(tokenizer)


def windows(
    source: TextSource | StandardLibrarySource | DatasetSource,
    running: Encoder,
    *,
    length: int,
    sequences: int | None,
    sampling: Sampling,
    seed: int,
    field: str,
    further: Sequence[int] = (),
) -> Windows:
    """Windows of `length` tokens, see `tokens.token_set`. Consecutive ones read as much of the text as they need. further:
    behind them, so many of each kind that share no token with those before, or as many as the text has."""
    consecutive = sampling == "consecutive"
    wanted = (sequences + sum(further)) * length if consecutive and sequences is not None else None
    stream = running.ids(lambda: pieces_of(source, field), wanted, field)
    available = len(stream) // length
    count = available if sequences is None else sequences
    if available < max(count, 1):
        raise RequestError(
            f"{field}: {len(stream)} tokens make {available} windows of {length}: expected at least {max(count, 1)}"
        )
    if consecutive:
        starts = [index * length for index in range(min(count + sum(further), available))]
    else:
        draw = random.Random(seed)
        starts = [draw.randrange(len(stream) - length + 1) for _ in range(count)]
        for kind in further:
            starts += _apart(starts, kind, len(stream), length)
    return [stream[start : start + length] for start in starts]


def _apart(taken: list[int], wanted: int, tokens: int, length: int) -> list[int]:
    """Where so many windows begin that overlap none of those that begin at `taken`, evenly spaced among all of their kind;
    fewer where the text has fewer."""
    places: list[int] = []
    end = 0
    for start in (*sorted(taken), tokens):
        places += range(end, start - length + 1, length)
        end = max(end, start + length)
    count = min(wanted, len(places))
    return [places[index * len(places) // count] for index in range(count)]
