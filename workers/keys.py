"""Keys of durable work: digests of everything that determines a result, and of nothing else.

Never of paths, times or worker counts. Three revisions say what computed: `NUMERICS` that of the mathematics which all
methods share, a method's `VERSION` its own, and the versions of the libraries. Whoever changes a result's bits raises the
one that covers the change; `tests/golden` finds out when nobody did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata

from counterweight.workers.config import Config, Method
from counterweight.workers.parallel import PIECE_TOKENS

NUMERICS = 2

LIBRARIES = ("torch", "transformers")
"""Libraries whose version may change a result's bits."""


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, no spaces, no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def digest(value: object) -> str:
    """sha256 (hex) of `canonical_json`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@cache
def _libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def numerics() -> dict[str, str | int]:
    """What computes: part of every key, so that work of other versions never matches."""
    return {"counterweight": NUMERICS, "piece_tokens": PIECE_TOKENS, **_libraries()}


def versions(options: object) -> dict[str, int]:
    """Class name -> `VERSION` of every method among `options`: models, mappings, tuples and lists are searched."""
    found: dict[str, int] = {}
    parts: Iterable[object] = ()
    if isinstance(options, Method):
        found[type(options).__name__] = options.VERSION
    if isinstance(options, Config):
        parts = (value for _, value in options)
    elif isinstance(options, Mapping):
        parts = options.values()
    elif isinstance(options, tuple | list):
        parts = options
    for part in parts:
        found |= versions(part)
    return found
