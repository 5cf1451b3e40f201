"""Random damage to JSON and to bytes, from a seed; and none at all, for what harmless inputs cost."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Protocol


def deep(levels: int) -> Any:
    """Lists inside each other."""
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    1 << 20,
    10**7,
    1 << 31,
    1 << 63,
    10**30,
    0.0,
    -0.5,
    1e-30,
    1e30,
    1e308,
    "",
    "0",
    "x",
    "x" * 2000,
    "../../etc/passwd",
    "/dev/zero",
    "\x1b[2J\n",
    "\ud800",
    [],
    {},
    [[]],
    [0] * 100,
    {"a": {"b": {"c": [1, 2, {"d": None}]}}},
    deep(40),
    deep(900),
]
"""What stands where something else should."""


@contextmanager
def deep_stack() -> Iterator[None]:
    """For what makes and copies inputs that are nested deeper than Python's own limit; what is tested runs with that one."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:50]):
            found += places(inner, (*path, index))
    return found


@deep_stack()
def mutated(document: Any, draw: Random) -> Any:
    """The document with one to three values replaced, removed, copied from elsewhere, changed a little, or added."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        paths = places(document)
        if not paths:
            return draw.choice(VALUES)
        path = draw.choice(paths)
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        key, kind = path[-1], draw.randrange(6)
        if kind <= 1:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == 2:
            del parent[key]
        elif kind == 3:
            source = document
            for step in draw.choice(paths):
                try:
                    source = source[step]
                except (KeyError, IndexError, TypeError):
                    break
            parent[key] = copy.deepcopy(source)
        elif kind == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = draw.choice([parent[key] + 1, parent[key] - 1, parent[key] * 2, -parent[key]])
        elif isinstance(parent, dict):
            parent[draw.choice(["extra", "num_labels", "num_things", "type", "size", *parent])] = draw.choice(VALUES)
    return document


@deep_stack()
def as_bytes(document: Any, draw: Random) -> bytes:
    """JSON, now and then with a key said twice or NaN in it."""
    text = json.dumps(document)
    if draw.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    if draw.random() < 0.05:
        text = text.replace("1", "NaN", 1)
    return text.encode("utf-8", "surrogatepass")


def damaged(data: bytes, draw: Random, end: int | None = None) -> bytes:
    """The bytes with one to four of them (before `end`) flipped, cut out, repeated or replaced."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(max(1, min(len(found), end or len(found))))
        stop = start + draw.randrange(1, 20)
        kind = draw.randrange(4)
        if kind == 0 and found:
            found[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[start:stop]
        elif kind == 2:
            found[start:start] = found[start:stop]
        else:
            found[start:stop] = draw.randbytes(stop - start)
    return bytes(found)


class Damage(Protocol):
    """What is done to an honest input."""

    def mutated(self, document: Any, draw: Random) -> Any:
        """To the values of a JSON document."""

    def as_bytes(self, document: Any, draw: Random) -> bytes:
        """To its text."""

    def damaged(self, data: bytes, draw: Random, end: int | None = None) -> bytes:
        """To bytes, before `end`."""


class Hostile:
    """Damage as above."""

    mutated, as_bytes, damaged = staticmethod(mutated), staticmethod(as_bytes), staticmethod(damaged)


class Harmless:
    """None."""

    def mutated(self, document: Any, draw: Random) -> Any:
        return document

    def as_bytes(self, document: Any, draw: Random) -> bytes:
        return json.dumps(document).encode()

    def damaged(self, data: bytes, draw: Random, end: int | None = None) -> bytes:
        return data
