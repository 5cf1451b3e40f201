"""Strict YAML and JSON: what a manifest's text says, as plain dicts, lists and scalars, or a `ManifestError`.

Stock YAML is too helpful for a file that decides what a cluster does: a key given twice loses in silence,
`no` is a boolean, `012` is ten, `12:30` is 750, a date is an object, and nine lines of aliases expand to
gigabytes. Here scalars follow the core schema of YAML 1.2 without its octal and hexadecimal forms; whatever
is not plainly a number, a boolean or a null stays the string that was written, and the model says whether a
string was wanted. Anchors, aliases, tags and further documents are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from counterweight.pipeline.manifest.problems import Path, cut, problem, show
from counterweight.workers.errors import ManifestError

# A wrong manifest is refused within a second. PyYAML's scanner takes up to 3 microseconds a character and
# some 60 a value: under these limits the worst texts take about half a second.
MAX_BYTES = 128 << 10

MAX_DEPTH = 40
MAX_VALUES = 5_000
MAX_DIGITS = 40  # of an integer; Python takes quadratic time for very long ones

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def parse_yaml(data: bytes | str, *, name: str, path: Path = ()) -> object:
    """The one document of a YAML text.

    name: what errors of the text as a whole call it. path: where in a manifest the value belongs.

    Raises `ManifestError` for text that is not UTF-8 or not YAML, for anything the module's docstring
    refuses, and beyond the limits on bytes, depth and number of values.
    """
    return _YamlDocument(_text(data, name), name).read(path)


def parse_json(data: bytes | str, *, name: str) -> object:
    """The value of a JSON text, under the limits of `parse_yaml`. Raises `ManifestError`."""
    try:
        parsed = json.loads(
            _text(data, name),
            object_pairs_hook=_Pairs,
            parse_int=_Literal,
            parse_float=_Literal,
            parse_constant=_Literal,
        )
    except RecursionError as error:
        raise _too_deep(()) from error
    except json.JSONDecodeError as error:
        raise ManifestError(f"{name}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    return _JsonDocument().read(parsed, ())


def too_large(name: str) -> ManifestError:
    """The error for a text beyond `MAX_BYTES`."""
    return ManifestError(f"{name}: larger than {MAX_BYTES >> 10} KiB, expected a manifest of a few KiB")


def _too_deep(path: Path) -> ManifestError:
    """The error for a value below `path` that is nested beyond `MAX_DEPTH`."""
    return problem(path[:3], f"nested deeper than {MAX_DEPTH} levels")


def _text(data: bytes | str, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise too_large(name)
    if isinstance(data, str):
        return data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{name}: byte {error.start} is not UTF-8, expected a text") from error


class _Limits:
    """Counts values while a document is read."""

    def __init__(self) -> None:
        self._values = 0

    def enter(self, path: Path) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise problem(path, f"more than {MAX_VALUES} values in one manifest")
        if len(path) > MAX_DEPTH:
            raise _too_deep(path)


class _TooDeepError(yaml.YAMLError):
    pass


class _Scanner(yaml.SafeLoader):
    """Stops at once where brackets are nested too deeply: it reads a thousand characters ahead, and takes
    quadratic time for brackets.
    """

    def fetch_flow_collection_start(self, TokenClass: object) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise _TooDeepError
        super().fetch_flow_collection_start(TokenClass)


class _YamlDocument:
    """Reads the events of PyYAML, not its objects: aliases, tags and YAML 1.1 come in with those."""

    def __init__(self, text: str, name: str) -> None:
        self._events: Iterator[object] = yaml.parse(text, Loader=_Scanner)
        self._name = name
        self._limits = _Limits()

    def read(self, path: Path) -> object:
        self._next()  # start of the stream
        if isinstance(self._next(), yaml.StreamEndEvent):
            raise ManifestError(f"{self._name}: empty, expected a manifest")
        value = self._value(self._next(path), path)
        self._next()  # end of the document
        if not isinstance(event := self._next(), yaml.StreamEndEvent):
            raise ManifestError(f"{self._name}: {_line(event)}: a second document, expected one")
        return value

    def _next(self, path: Path = ()) -> object:
        """The next event. path: of the value that it may begin."""
        try:
            return next(self._events)
        except _TooDeepError as error:
            raise _too_deep(path) from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            what = ": ".join(filter(None, (error.context, error.problem)))
            raise ManifestError(f"{self._name}: {at}not YAML: {_one_line(what)}") from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # PyYAML lets the errors of int() and chr() through for absurd versions and escapes.
            raise ManifestError(f"{self._name}: not YAML: {_one_line(str(error))}") from error

    def _value(self, event: Any, path: Path) -> Any:
        self._limits.enter(path)
        if isinstance(event, yaml.AliasEvent):
            raise problem(path, f"{_line(event)}: an alias (*): expected the value itself, or quotes around it")
        if event.anchor is not None:
            raise problem(path, f"{_line(event)}: an anchor (&): expected none, or quotes around it")
        if event.tag is not None:
            raise problem(path, f"{_line(event)}: tag {show(event.tag)}: expected none")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        plain = event.style is None
        return _plain_scalar(event.value, path) if plain else _string(event.value, path)

    def _sequence(self, path: Path) -> list[object]:
        items: list[object] = []
        while not isinstance(event := self._next((*path, len(items))), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, object]:
        members: dict[str, object] = {}
        while not isinstance(event := self._next(path), yaml.MappingEndEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                raise problem(path, f"{_line(event)}: a list or mapping as a key: expected a string")
            key = self._value(event, path)
            if not isinstance(key, str):
                raise problem(path, f"{_line(event)}: key {show(key)}: expected a string")
            if key in members:
                raise problem((*path, key), f"{_line(event)}: key given twice")
            below = (*path, key)
            members[key] = self._value(self._next(below), below)
        return members


class _Pairs(list[tuple[str, object]]):
    """A JSON object as written, before anyone asked whether a key occurs twice."""


class _Literal(str):
    """A JSON number or constant as written, before anyone asked whether it is finite."""


class _JsonDocument:
    def __init__(self) -> None:
        self._limits = _Limits()

    def read(self, parsed: object, path: Path) -> object:
        self._limits.enter(path)
        if isinstance(parsed, _Literal):
            return _number(parsed, path)
        if isinstance(parsed, str):
            return _string(parsed, path)
        if isinstance(parsed, _Pairs):
            members: dict[str, object] = {}
            for key, value in parsed:
                if (key := _string(key, path)) in members:
                    raise problem((*path, key), "key given twice")
                members[key] = self.read(value, (*path, key))
            return members
        if isinstance(parsed, list):
            return [self.read(item, (*path, index)) for index, item in enumerate(parsed)]
        return parsed


def _plain_scalar(text: str, path: Path) -> object:
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        return _number(text, path)
    return _string(text, path)


def _number(text: str, path: Path) -> int | float:
    if _INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise problem(path, f"{cut(text)}: an integer of more than {MAX_DIGITS} digits")
        return int(text)
    number = float(text) if _FLOAT.fullmatch(text) else math.nan
    if not math.isfinite(number):
        raise problem(path, f"{cut(text)}: expected a finite number")
    return number


def _string(text: str, path: Path) -> str:
    # JSON writes characters beyond the first 65,536 as two escapes, and YAML readers leave them in halves. A
    # half alone is no character, and no file, key or URI could hold it.
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise problem(path, f"{show(text)}: half a surrogate pair, expected whole characters") from error


def _line(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:200]
