"""Texts to token ids, in a process of its own (`encoder_process`) that a tokenizer cannot harm anybody from."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

from counterweight.workers.calibration import encoder_process
from counterweight.workers.calibration.chat_template import ChatTemplate, Message, without_template
from counterweight.workers.calibration.encoder_process import read_frame, write_frame
from counterweight.workers.errors import RequestError, SurroundingsError

FIRST, LARGEST = 1 << 14, 1 << 20
"""Characters of a text's first piece and of its largest: each is twice as long as the one before."""

MAX_TOKENIZER_BYTES = 64 << 20
"""Of a tokenizer.json; the largest in use have 35 MB."""

MAX_WHOLE_BYTES = 32 << 20
"""Of a text that a tokenizer can only take as a whole."""

Pieces = Callable[[], Iterator[str]]
"""Begins a text anew."""


class Encoder:
    """A running tokenizer. A context manager; RequestError, naming tokenizer.json, for whatever it does but give ids.

    tokenizer: tokenizer.json; truncation and padding that it asks for are not done. chat: for data sets of conversations;
    no_chat: why the model's cannot be read.
    """

    def __init__(self, tokenizer: bytes, chat: ChatTemplate | None = None, no_chat: str = "") -> None:
        if len(tokenizer) > MAX_TOKENIZER_BYTES:
            raise RequestError(f"tokenizer.json: {len(tokenizer)} bytes, expected at most {MAX_TOKENIZER_BYTES}")
        self._chat, self._no_chat, self._converses = chat, no_chat, False
        self._process = subprocess.Popen(
            # -P: the script's folder holds modules that are called as some of Python's own.
            [sys.executable, "-P", encoder_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        try:
            self._ask(b"L", tokenizer, "")
        except BaseException:
            self.close()
            raise

    def specials(self) -> tuple[array[int], array[int]]:
        """Ids that the tokenizer puts before a text, and behind it. RequestError where they cannot be told from the text's."""
        found = self._ask(b"S", b"", "")
        if found is None:
            raise RequestError(
                "special_tokens: window: tokenizer.json has other tokens for a text with special tokens than for one without "
                "them: expected `text`"
            )
        return found[1 : 1 + found[0]], found[1 + found[0] :]

    def ids(self, pieces: Pieces, wanted: int | None, field: str, *, framed: bool = True) -> array[int]:
        """The first `wanted` ids of a text (a few more, or fewer where it ends), or all; read no further than that takes.

        They are those of the text as a whole, see `encoder_process.Stream`. field: what the text is called in messages. framed:
        with the special tokens that the tokenizer puts before and behind a text.
        """
        found = self._divided(pieces(), wanted, field, framed=framed)
        return self._whole(pieces(), field, framed=framed) if found is None else found

    def text_of(self, messages: Sequence[Message], where: str) -> str:
        """A conversation through the model's chat template. where: what it is called in messages. RequestError without a
        template, and for one that fails."""
        if self._chat is None:
            return without_template(messages, where, self._no_chat)
        try:
            if not self._converses:
                self._ask(b"C", self._chat.to_bytes(), "")
                self._converses = True
            return self._answer(b"M", json.dumps(messages, default=str).encode(), "")[1].decode()
        except RequestError as error:
            said = str(error).removeprefix("tokenizer.json: ")
            raise RequestError(f"{where}: the model's chat template: {said}") from error

    def _divided(self, pieces: Iterable[str], wanted: int | None, field: str, *, framed: bool) -> array[int] | None:
        """None where parts of the text have other tokens than the whole."""
        self._ask(b"B", b"0%d" % framed, field)
        ids = array("I")
        for piece in _growing(pieces):
            more = self._ask(b"T", piece.encode(), field)
            if more is None:
                return None
            ids.extend(more)
            if wanted is not None and len(ids) >= wanted:
                return ids
        ids.extend(self._ask(b"E", b"0", field) or array("I"))
        return ids

    def _whole(self, pieces: Iterable[str], field: str, *, framed: bool) -> array[int]:
        self._ask(b"B", b"1%d" % framed, field)
        size = 0
        for piece in _growing(pieces):
            data = piece.encode()
            size += len(data)
            if size > MAX_WHOLE_BYTES:
                raise RequestError(
                    f"{field}: more than {MAX_WHOLE_BYTES} bytes: expected fewer, because tokenizer.json has other tokens for "
                    "parts of this text than for the whole"
                )
            self._ask(b"T", data, field)
        return self._ask(b"E", b"%d" % size, field) or array("I")

    def _ask(self, kind: bytes, payload: bytes, field: str) -> array[int] | None:
        """Ids, or None for a text that cannot be divided."""
        answer, data = self._answer(kind, payload, field)
        return None if answer == b"U" else array("I", data)

    def _answer(self, kind: bytes, payload: bytes, field: str) -> tuple[bytes, bytes]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        where = f" on the text of {field}" if field else ""
        try:
            write_frame(self._process.stdin, kind, payload)
            answer, data = read_frame(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise self._died(where) from error
        if answer == b"F":
            said = " ".join(data.decode(errors="replace").split())[:300]
            raise RequestError(f"tokenizer.json: {said}{where}")
        return answer, data

    def _died(self, where: str) -> RequestError | SurroundingsError:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return RequestError(f"tokenizer.json: takes too long{where}: expected at least 50 kB of text a second")
        if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
            return RequestError(f"tokenizer.json: takes more than 1 GiB of memory, or crashes{where}")
        return SurroundingsError(f"the process that tokenizes ended with exit code {code}{where}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _growing(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of `FIRST` characters, then twice as many, up to `LARGEST`; the last may be shorter."""
    held: list[str] = []
    size, most = 0, FIRST
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size < most:
            continue
        text = "".join(held)
        position = 0
        while len(text) - position >= most:
            yield text[position : position + most]
            position += most
            most = min(2 * most, LARGEST)
        held, size = [text[position:]], len(text) - position
    if size:
        yield "".join(held)
