"""A strict reader of the safetensors header.

A file is 8 bytes (the header's length, little-endian), the header (JSON), and the tensors' bytes. The header
is an object of exactly two levels, so it is walked over its raw bytes and the first byte that does not fit
ends it: what a hostile header can make us build is bounded by `MAX_TENSORS` entries of bounded size, whatever
its JSON says. The safetensors library lets a second tensor of the same name replace the first; here nothing
is said twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

from counterweight.workers.checkpoint.dtypes import DTYPES, StoredDtype
from counterweight.workers.checkpoint.refusal import show
from counterweight.workers.errors import CheckpointError

LENGTH_BYTES = 8

MAX_TENSORS = 200_000
"""A trillion-parameter model with one tensor per expert's linear has about 140,000."""

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_NAME_LENGTH = 512  # characters; the longest in use are near 100
MAX_DIMENSIONS = 16  # the deepest weights in use (convolutions in space and time) have 5
MAX_METADATA_BYTES = 1 << 20  # free text that nothing here reads
_MAX_ENTRY_BYTES = 4096  # sixteen dimensions of nineteen digits take 400
_MAX_COUNT_DIGITS = 19  # as many as 2**63 has

METADATA = "__metadata__"

_SPACE = rb"[ \t\n\r]*+"
# Possessive: a string of a hundred megabytes costs one pass and no stack of alternatives to return to.
_STRING = re.compile(_SPACE + rb'("(?:[^"\\\x00-\x1f]++|\\.)*+")')
_OPEN = re.compile(_SPACE + rb"(\{)")
_CLOSE = re.compile(_SPACE + rb"(\})")
_KEY = re.compile(_STRING.pattern + _SPACE + rb":")
_NEXT = re.compile(_SPACE + rb"([,}])")
_PADDING = re.compile(rb" *+")
_ENTRY = re.compile(_SPACE + rb"(\{[^{}]{0,%d}+\})" % (_MAX_ENTRY_BYTES - 2))

_FIELDS = {"dtype", "shape", "data_offsets"}


class _BadField(ValueError):
    """What is wrong with one tensor's entry; file and tensor are put in front where they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: `length` bytes from byte `start` of `file`, row-major and little-endian.

    file: the object's key in the checkpoint's store. shape: () for a scalar. length: elements times the
    size of the dtype that is stored.
    """

    name: str
    dtype: StoredDtype
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header: entries by name, in the header's order, and the free-text metadata."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, *, file: str, file_size: int) -> int:
    """The header's length in bytes, from the file's first eight bytes (fewer when the file is shorter).

    Raises `CheckpointError` when the file is too short, or the length beyond the file or `MAX_HEADER_BYTES`.
    """
    if file_size < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{file}: {file_size} bytes, expected at least {LENGTH_BYTES} (a safetensors file)")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    if length > file_size - LENGTH_BYTES:
        raise CheckpointError(f"{file}: header of {length} bytes in a file of {file_size} bytes")
    return length


def parse_header(
    header: bytes | bytearray,
    *,
    file: str,
    file_size: int,
    already: int = 0,
    dtypes: Mapping[str, StoredDtype] = DTYPES,
) -> Header:
    """Parses the header's JSON (without the eight length bytes) of a file of `file_size` bytes.

    `already`: tensors that other files of the checkpoint have; `MAX_TENSORS` bounds them all together.
    `dtypes`: the words that are allowed.

    Checks that the tensors fill the rest of the file exactly: no hole, no overlap, nothing behind the last.
    Raises `CheckpointError` naming the file, the tensor, the value and what was expected.
    """
    if not header.startswith(b"{"):  # the format allows no white space here
        raise CheckpointError(f"{file}: header begins {show(bytes(header[:8]))}, expected '{{'")
    scanner = _Scanner(header, file)
    entries: dict[str, TensorEntry] = {}
    metadata: Mapping[str, str] | None = None
    data_start = LENGTH_BYTES + len(header)
    for name in scanner.members(limit=_escaped(MAX_NAME_LENGTH)):
        if name == METADATA:
            if metadata is not None:
                raise CheckpointError(f"{file}: {METADATA} occurs twice in the header")
            metadata = _metadata(scanner)
            continue
        check_name(name, file=file)
        if name in entries:
            raise CheckpointError(f"{file}: tensor {show(name)} occurs twice in the header")
        if already + len(entries) == MAX_TENSORS:
            raise CheckpointError(f"{file}: more than {MAX_TENSORS} tensors in all")
        try:
            entries[name] = _entry(scanner.fields(name), name, file, data_start, dtypes)
        except _BadField as error:
            raise CheckpointError(f"{file}: tensor {show(name)}: {error}") from error
    scanner.finish()
    _check_layout(entries, file=file, data_start=data_start, file_size=file_size)
    return Header(entries=entries, metadata=metadata or {})


def check_name(name: str, *, file: str) -> None:
    """Raises `CheckpointError` unless `name` is printable text of 1 to `MAX_NAME_LENGTH` characters.

    Printable in `str.isprintable`'s sense: no control or formatting characters, which let two names look the
    same and let a name rewrite the terminal that shows it.
    """
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise CheckpointError(
            f"{file}: tensor {show(name)}: name of {len(name)} characters, expected 1 to {MAX_NAME_LENGTH}"
        )
    if not name.isprintable() or name == METADATA:
        raise CheckpointError(f"{file}: tensor {show(name)}: name, expected printable characters")


def _escaped(length: int) -> int:
    """Bytes that a JSON string of `length` characters takes at most: six for each (\\u0041; a pair of
    surrogates, twelve, is one character), and its quotes."""
    return 12 * length + 2


class _Scanner:
    """Walks JSON objects over raw bytes; whatever does not fit the grammar raises `CheckpointError` with its
    offset."""

    def __init__(self, data: bytes | bytearray, file: str) -> None:
        self._data = data
        self._file = file
        self.position = 0

    def members(self, *, limit: int) -> Iterator[str]:
        """The keys of the object that begins here; the caller takes each value before asking for the next
        key."""
        self._take(_OPEN, "an object")
        if _CLOSE.match(self._data, self.position):
            self._take(_CLOSE, "'}'")
            return
        while True:
            yield self._text(self._take(_KEY, "a name in quotes and ':'", limit))
            if self._take(_NEXT, "',' or '}'") == b"}":
                return

    def string(self, *, limit: int) -> str:
        """The string that begins here, of at most `limit` bytes with its quotes."""
        return self._text(self._take(_STRING, "a string in quotes", limit))

    def _text(self, token: bytes | bytearray) -> str:
        text = self._decoded(token)
        return str(self._parsed(text)) if "\\" in text else text[1:-1]

    def fields(self, name: str) -> object:
        """The object that describes the tensor `name`, as a list of (field, value)."""
        try:
            return self._parsed(self._decoded(self._take(_ENTRY, "an object of dtype, shape and data_offsets")))
        except CheckpointError as error:
            raise CheckpointError(f"{error}, for tensor {show(name)}") from error

    def finish(self) -> None:
        """Nothing but padding may follow."""
        if not _PADDING.fullmatch(self._data, self.position):
            raise self.misfit("text after the header's object, expected spaces")

    def _take(self, pattern: re.Pattern[bytes], expected: str, limit: int = MAX_METADATA_BYTES) -> bytes | bytearray:
        match = pattern.match(self._data, self.position)
        if match is None:
            found = bytes(self._data[self.position : self.position + 24])
            raise self.misfit(f"{show(found) if found else 'the end'}, expected {expected}")
        begin, end = match.span(1)
        if end - begin > limit:  # before it is copied
            raise self.misfit(f"a string of {end - begin} bytes, expected at most {limit}")
        self.position = match.end()
        return self._data[begin:end]

    def _decoded(self, token: bytes | bytearray) -> str:
        try:
            return token.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.misfit(f"{show(bytes(token))} is not UTF-8") from error

    def _parsed(self, text: str) -> object:
        try:
            return (_CAREFUL if _UNUSUAL.search(text) else _DECODER).decode(text)
        except (ValueError, RecursionError) as error:
            raise self.misfit(f"{show(text)} is not JSON: {error}") from error

    def misfit(self, problem: str) -> CheckpointError:
        """The error for a `problem` near the current position."""
        return CheckpointError(f"{self._file}: header, near byte {self.position}: {problem}")


def _plain_count(text: str) -> int | str:
    """A number that is not a plain count stays text, and is refused with its text where a count is wanted."""
    return int(text) if text[0] != "-" and len(text) <= _MAX_COUNT_DIGITS else text


_UNUSUAL = re.compile(f"-|[0-9]{{{_MAX_COUNT_DIGITS + 1}}}")
"""What may be no plain count; a header has twenty numbers a tensor, and hardly ever one that is not."""

# Objects become lists of pairs, so that a field said twice is seen.
_DECODER = json.JSONDecoder(object_pairs_hook=list, parse_float=str, parse_constant=str, strict=True)
_CAREFUL = json.JSONDecoder(
    object_pairs_hook=list, parse_int=_plain_count, parse_float=str, parse_constant=str, strict=True
)


def _metadata(scanner: _Scanner) -> Mapping[str, str]:
    metadata: dict[str, str] = {}
    begin = scanner.position
    for key in scanner.members(limit=MAX_METADATA_BYTES):
        if key in metadata:
            raise scanner.misfit(f"{METADATA}: key {show(key)} occurs twice")
        metadata[key] = scanner.string(limit=MAX_METADATA_BYTES)
        if scanner.position - begin > MAX_METADATA_BYTES:
            raise scanner.misfit(f"{METADATA} of more than {MAX_METADATA_BYTES} bytes")
    return metadata


def _entry(pairs: object, name: str, file: str, data_start: int, dtypes: Mapping[str, StoredDtype]) -> TensorEntry:
    assert isinstance(pairs, list)  # the pattern admits nothing but an object
    fields = dict(pairs)
    if len(pairs) != len(_FIELDS) or fields.keys() != _FIELDS:
        keys = [key for key, _ in pairs]
        raise _BadField(f"fields {show(keys)}, expected dtype, shape and data_offsets, each once")
    word = fields["dtype"]
    if not isinstance(word, str) or word not in dtypes:
        raise _BadField(f"dtype {show(word)}, expected one of {', '.join(dtypes)}")
    shape = _counts(fields["shape"], "shape")
    offsets = _counts(fields["data_offsets"], "data_offsets")
    if len(shape) > MAX_DIMENSIONS:
        raise _BadField(f"shape of {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _BadField(f"data_offsets {show(list(offsets))}, expected [begin, end]")
    dtype = dtypes[word]
    length = math.prod(shape) * dtype.itemsize
    # Strides are computed from the dimensions that are not empty, and must not overflow either.
    if (length or math.prod(filter(None, shape)) * dtype.itemsize) >= 2**63:
        raise _BadField(f"shape {show(list(shape))} of {word}: beyond 2**63 bytes")
    if offsets[1] - offsets[0] != length:
        raise _BadField(
            f"shape {show(list(shape))} of {word} takes {length} bytes, "
            f"but data_offsets {list(offsets)} hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=file, start=data_start + offsets[0], length=length)


def _counts(value: object, field: str) -> tuple[int, ...]:
    # Not isinstance: JSON's true is an int to Python.
    if not isinstance(value, list) or not {int}.issuperset(map(type, value)):
        raise _BadField(f"{field} {show(value)}, expected a list of whole numbers from 0 to 2**63")
    return tuple(value)


def _check_layout(entries: Mapping[str, TensorEntry], *, file: str, data_start: int, file_size: int) -> None:
    end, before = data_start, ""
    for entry in sorted(entries.values(), key=attrgetter("start", "length")):
        if entry.start != end:
            kind = f"overlaps {show(before)}" if entry.start < end else "leaves a hole"
            raise CheckpointError(
                f"{file}: tensor {show(entry.name)}: begins at data byte {entry.start - data_start}, "
                f"expected {end - data_start}: {kind}"
            )
        end, before = entry.start + entry.length, entry.name
    if end != file_size:
        raise CheckpointError(
            f"{file}: {file_size - data_start} bytes of tensor data, but the tensors take {end - data_start}"
        )
