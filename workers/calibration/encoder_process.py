"""The process that runs a tokenizer: what a tokenizer.json can do to it, it cannot do to the job.

Run as a script by `encoder.Encoder`, with nothing but `tokenizers` imported. A tokenizer can be built to take all memory (a
normalizer that replaces one letter by a megabyte), all time (a regular expression that backtracks) or to panic; here it meets
limits of its own, and the worst that comes of it is a dead process.

Frames, both ways: a byte for the kind, eight for the payload's length (little-endian), the payload. To this process: `L`
tokenizer.json; `S` asks for special tokens; `B` a text begins (payload: two digits, 1 to take it whole and 1 to frame it by
special tokens); `T` its next piece, UTF-8; `E` it ends (payload: bytes that are to be taken now); `C` a chat template; `M` a
conversation for it, as JSON. Each is answered: `I` further ids (uint32), `R` a conversation's text, `U` where parts of the
text have other tokens than the whole, `F` with what went wrong. The answer to `S`: how many tokens stand before a text, then
these and those behind it.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from array import array
from typing import IO, TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Template

HEAD = 9

OVERLAP = 4096
"""Characters that two windows of a text share, at first."""

RUN = 16
"""Tokens in a row that two windows must agree on, identity and place, where one takes over from the other."""

LOAD_SECONDS, PIECE_SECONDS, SECONDS_PER_BYTE = 1.5, 1.0, 20e-6
"""CPU time: for a tokenizer.json, for a piece of text, and for each byte of either."""

MEMORY, MEMORY_PER_TOKENIZER_BYTE, MEMORY_PER_TEXT_BYTE = 1 << 30, 20, 300
"""Bytes: at least, for each byte of tokenizer.json, and for each of a piece."""


PROBE = "a text of five words"
"""Any text shows what stands around all."""


class Encoding(Protocol):
    """What of `tokenizers.Encoding` is used. offsets: where each token lies in the text, in characters."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


class Model(Protocol):
    """What of `tokenizers.Tokenizer` is used."""

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> Encoding: ...


class Undivided(Exception):
    """Parts of a text have other tokens than the whole."""


class Window:
    """Tokens of a part of the text that begins at character `start`: ids, and where each lies in the whole text."""

    def __init__(self, model: Model, text: str, start: int) -> None:
        found = model.encode(text, add_special_tokens=False)
        self.start, self.text = start, text
        self.ids = list(found.ids)
        self.places = [(start + begin, start + end) for begin, end in found.offsets]


class Stream:
    """Ids of a text that comes piece by piece: those of the text as a whole.

    Each window repeats the end of the one before. Both are cut at a token in that overlap around which they have the same
    tokens at the same places, away from the edges of either. What a tokenizer makes of a place depends on the characters
    around it: on the word, or the run of spaces, for all tokenizers in use. One whose tokens depend on what is thousands of
    characters away, and that agrees on `RUN` tokens all the same, would give other ids here than for the text as a whole.
    """

    def __init__(self, model: Model, *, whole: bool, framed: bool = True) -> None:
        self._model, self._whole, self._framed = model, whole, framed
        self._text: list[str] = []
        self._window: Window | None = None
        self._from = 0
        self._prefix: list[int] | None = None
        self._suffix: list[int] = []

    def add(self, piece: str) -> list[int]:
        """Further ids that the rest of the text cannot change."""
        if self._whole:
            self._text.append(piece)
            return []
        last = self._window
        if last is None:
            if self._framed:
                self._prefix, self._suffix = specials(self._model, piece)
            self._window = Window(self._model, piece, 0)
            return self._prefix or []
        overlap = min(OVERLAP, len(last.text))
        while True:
            joined = last.text[-overlap:] + piece
            window = Window(self._model, joined, last.start + len(last.text) - overlap)
            cut = _agreement(last, self._from, window, overlap)
            if cut is not None:
                mine, its = cut
                ids = last.ids[self._from : mine]
                self._window, self._from = window, its
                return ids
            if overlap == len(last.text):
                raise Undivided
            overlap = min(8 * overlap, len(last.text))

    def end(self) -> list[int]:
        """The last ids."""
        if self._whole:
            return list(self._model.encode("".join(self._text), add_special_tokens=self._framed).ids)
        if self._window is None:
            return list(self._model.encode("", add_special_tokens=self._framed).ids)
        return self._window.ids[self._from :] + self._suffix


def specials(model: Model, text: str) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and behind a text. Undivided where it has other tokens between them."""
    alone = list(model.encode(text, add_special_tokens=False).ids)
    framed = list(model.encode(text).ids)
    for before in range(len(framed) - len(alone) + 1):
        if framed[before : before + len(alone)] == alone:
            return framed[:before], framed[before + len(alone) :]
    raise Undivided


def _agreement(first: Window, used: int, second: Window, overlap: int) -> tuple[int, int] | None:
    """Index of a token of `first`, not before `used`, and of the same token of `second`: around it both have the same tokens,
    between a quarter and three quarters of their overlap. None when there is none."""
    low, high = second.start + overlap // 4, second.start + overlap - overlap // 4
    where: dict[tuple[int, int, int], int] = {}
    for index, (token, (begin, end)) in enumerate(zip(second.ids, second.places, strict=True)):
        if begin >= high:
            break
        if begin >= low:
            where.setdefault((token, begin, end), index)
    run, other = 0, -1
    for index in range(used, len(first.ids)):
        begin, end = first.places[index]
        if begin >= high:
            break
        found = where.get((first.ids[index], begin, end), -1) if begin >= low else -1
        follows = run > 0 and other + 1 < len(second.ids) and second.ids[other + 1] == first.ids[index]
        if follows and second.places[other + 1] == (begin, end):
            run, other = run + 1, other + 1
        else:
            run, other = (1, found) if found >= 0 else (0, -1)
        if run == RUN:
            return index - RUN // 2, other - RUN // 2
    return None


def read_frame(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """Kind and payload; EOFError at the end."""
    head = stream.read(HEAD)
    if len(head) < HEAD:
        raise EOFError
    length = int.from_bytes(head[1:], "little")
    payload = stream.read(length)
    if len(payload) < length:
        raise EOFError
    return head[:1], payload


def write_frame(stream: IO[bytes], kind: bytes, payload: bytes = b"") -> None:
    """Sends one frame."""
    stream.write(kind + len(payload).to_bytes(HEAD - 1, "little"))
    stream.write(payload)
    stream.flush()


def _allow(seconds: float) -> None:
    """CPU time from now on, after which the kernel ends this process."""
    soft = math.ceil(time.process_time() + seconds)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _hold(amount: int) -> None:
    """Memory that this process may take, in bytes."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


class Server:
    """Answers frames one after another."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._memory = MEMORY
        self._stream: Stream | None = None
        self._chat: tuple[Template, Mapping[str, str]] | None = None

    def answer(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """The answer to a frame."""
        if kind == b"L":
            self._load(payload)
            return b"I", b""
        if kind in (b"C", b"M"):
            return self._converse(kind, payload)
        if kind == b"B":
            assert self._model is not None
            self._stream = Stream(self._model, whole=payload[:1] == b"1", framed=payload[1:] == b"1")
            return b"I", b""
        if kind == b"S":
            assert self._model is not None
            before, behind = specials(self._model, PROBE)
            return b"I", array("I", [len(before), *before, *behind]).tobytes()
        assert self._stream is not None
        size = len(payload) if kind == b"T" else int(payload)
        _allow(PIECE_SECONDS + SECONDS_PER_BYTE * size)
        _hold(self._memory + MEMORY_PER_TEXT_BYTE * size)
        try:
            ids = self._stream.add(payload.decode()) if kind == b"T" else self._stream.end()
        except Undivided:
            return b"U", b""
        return b"I", array("I", ids).tobytes()

    def _converse(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        from counterweight.workers.calibration.chat_template import compiled, rendered

        _allow(LOAD_SECONDS + SECONDS_PER_BYTE * len(payload))
        _hold(self._memory + MEMORY_PER_TEXT_BYTE * len(payload))
        if kind == b"C":
            self._chat = compiled(payload)
            return b"I", b""
        assert self._chat is not None
        return b"R", rendered(*self._chat, json.loads(payload)).encode()

    def _load(self, data: bytes) -> None:
        from tokenizers import Tokenizer

        self._memory = MEMORY + MEMORY_PER_TOKENIZER_BYTE * len(data)
        _allow(LOAD_SECONDS + SECONDS_PER_BYTE * len(data))
        _hold(self._memory)
        model = Tokenizer.from_buffer(data)
        model.no_truncation()
        model.no_padding()
        self._model = cast(Model, model)


def main() -> None:
    """Serves whoever started this process, until its input ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    server = Server()
    while True:
        try:
            kind, payload = read_frame(sys.stdin.buffer)
        except EOFError:
            return
        try:
            kind, payload = server.answer(kind, payload)
        except BaseException as error:  # noqa: BLE001  a panic of the library's is no Exception
            kind, payload = b"F", (str(error) or type(error).__name__)[:2000].encode(errors="replace")
        write_frame(sys.stdout.buffer, kind, payload)


if __name__ == "__main__":
    main()
