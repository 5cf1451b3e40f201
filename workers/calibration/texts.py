"""Texts of a manifest, piece by piece: whoever wants the first windows reads the first pages."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from counterweight.workers.calibration.chat_template import Message, is_conversation, without_template
from counterweight.workers.calibration.source import DatasetSource, StandardLibrarySource, TextSource
from counterweight.workers.calibration.standard_library import standard_library_pieces
from counterweight.workers.errors import ObjectNotFoundError, RequestError
from counterweight.workers.storage import ObjectStore, open_named

TEXT_CHUNK = 1 << 18
"""Bytes of a text that are read at a time."""

ROWS = 1000
"""Rows of a data set that are read at a time."""

FILES: Mapping[str, str] = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Ending of a data set that is one file -> what `datasets` reads it with."""


Render = Callable[[Sequence[Message], str], str]
"""A conversation, and what it is called in messages -> its text."""


def pieces_of(
    source: TextSource | StandardLibrarySource | DatasetSource, field: str, render: Render = without_template
) -> Iterator[str]:
    """The text from its beginning, in pieces of any size; RequestError, naming `field` of the manifest, where it is none.
    render: for rows of a data set that hold conversations."""
    if source.kind == "standard_library":
        return standard_library_pieces(source.part, source.content)
    return _file(source, field) if source.kind == "text" else _dataset(source, field, render)


def open_text(uri: str, field: str) -> tuple[ObjectStore, str, int]:
    """Store, key and size in bytes of the file that a source names; RequestError when there is none."""
    store, key = open_named(uri)
    try:
        return store, key, store.size(key)
    except ObjectNotFoundError as error:
        raise RequestError(f"{field}.uri: {uri}: no such file") from error


def _file(source: TextSource, field: str) -> Iterator[str]:
    """UTF-8 with the line ends that Python reads: a file with CRLF gives the tokens that every other tool gets from it."""
    store, key, size = open_text(source.uri, field)
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0  # of the first byte that is not decoded yet
    stream = store.stream(key, chunk=TEXT_CHUNK) if size else iter(())
    while True:
        chunk = next(stream, b"")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where = position - pending + error.start
            raise RequestError(f"{field}: {source.uri}: not UTF-8 text at byte {where}") from error
        position += len(chunk)
        yield lines.decode(text, final=not chunk)
        if not chunk:
            return


def _dataset(source: DatasetSource, field: str, render: Render) -> Iterator[str]:
    """Texts of the column with a blank line between them; conversations one behind the other."""
    rows = _rows(source, field)
    count = len(rows) if source.rows is None else min(source.rows, len(rows))
    for start in range(0, count, ROWS):
        texts = rows[start : min(start + ROWS, count)][source.column]
        for index, text in enumerate(texts, start):
            where = f"{field}.column: {source.column!r}: row {index} of dataset {source.path!r}"
            if is_conversation(text):
                yield render(text, where)
                continue
            if not isinstance(text, str):
                raise RequestError(f"{where} holds a {type(text).__name__}: expected text or messages")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"{where}: half of a character (surrogate) at {error.start}: expected text"
                ) from error
            yield text if index == 0 else "\n\n" + text


def _rows(source: DatasetSource, field: str) -> Any:
    """The data set, opened: its rows have the column."""
    import datasets  # costs a second that other sources need not pay

    if Path(source.path).exists() and not (Path(source.path).is_file() or Path(source.path).is_dir()):
        raise RequestError(f"{field}: dataset {source.path!r}: expected a folder or a regular file")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is ours to say, in one line
    datasets.disable_progress_bars()
    builder = FILES.get(Path(source.path).suffix) if Path(source.path).is_file() else None
    try:
        if builder is not None:
            rows = datasets.load_dataset(builder, data_files=source.path, split=source.split)
        else:
            rows = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # readers of five formats have errors of their own
        said = " ".join(f"{error} {error.__cause__ or ''}".split())[:500]
        raise RequestError(f"{field}: dataset {source.path!r}: {said}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if source.column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise RequestError(f"{field}.column: {source.column!r}: expected one of {columns}")
    return rows
