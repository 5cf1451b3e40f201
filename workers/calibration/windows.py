"""Windows of token ids out of a text, as numbers: without torch, so that a wrong text is told before anything else starts."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from counterweight.workers.calibration.chat_template import ChatTemplate
from counterweight.workers.calibration.encoder import Encoder
from counterweight.workers.calibration.source import DatasetSource, SpecialTokens, StandardLibrarySource, TextSource
from counterweight.workers.calibration.texts import pieces_of
from counterweight.workers.errors import RequestError

Sampling = Literal["consecutive", "random"]

Windows: TypeAlias = "list[array[int]]"
"""Token ids, one array for each window; all of one length."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model brings: tokenizer.json, and the chat template where it has one. no_chat: why what it has cannot be read."""

    tokenizer: bytes
    chat: ChatTemplate | None = None
    no_chat: str = ""


AnyTokenizer: TypeAlias = "TokenizerFiles | bytes | None"
"""A model's files, a tokenizer.json alone, or none."""


CONVERT = (
    "python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('MODEL').save_pretrained('MODEL')\""
)
"""Makes tokenizer.json of a tokenizer.model, in the folder MODEL."""


def encoder(tokenizer: AnyTokenizer, field: str) -> Encoder:
    """The model's tokenizer, running; RequestError, naming `field`, without a tokenizer.json."""
    if tokenizer is None:
        raise RequestError(
            f"{field}: the model has no tokenizer.json: expected one, or a source of kind 'tokens'; to make one of a "
            f"tokenizer.model: pip install sentencepiece, and {CONVERT}"
        )
    return (
        Encoder(tokenizer)
        if isinstance(tokenizer, bytes)
        else Encoder(tokenizer.tokenizer, tokenizer.chat, tokenizer.no_chat)
    )


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
    special_tokens: SpecialTokens = "text",
) -> Windows:
    """Windows of `length` tokens, see `tokens.token_set`. Consecutive ones read as much of the text as they need. further:
    behind them, so many of each kind that share no token with those before, or as many as the text has."""
    of_window = special_tokens == "window"
    before, behind = running.specials() if of_window else (array("I"), array("I"))
    inner = length - len(before) - len(behind)
    if inner < 1:
        around = len(before) + len(behind)
        raise RequestError(
            f"{field}: windows of {length} tokens: expected more than {around}, the special tokens of each"
        )
    consecutive = sampling == "consecutive"
    wanted = (sequences + sum(further)) * inner if consecutive and sequences is not None else None
    stream = running.ids(lambda: pieces_of(source, field, running.text_of), wanted, field, framed=not of_window)
    available = len(stream) // inner
    count = available if sequences is None else sequences
    if available < max(count, 1):
        raise RequestError(
            f"{field}: {len(stream)} tokens make {available} windows of {inner}: expected at least {max(count, 1)}"
        )
    if consecutive:
        starts = [index * inner for index in range(min(count + sum(further), available))]
    else:
        draw = random.Random(seed)
        starts = [draw.randrange(len(stream) - inner + 1) for _ in range(count)]
        for kind in further:
            starts += _apart(starts, kind, len(stream), inner)
    return [before + stream[start : start + inner] + behind for start in starts]


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
