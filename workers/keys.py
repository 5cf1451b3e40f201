"""Keys of durable work: digests of everything that determines a result, and of nothing else.

Never of paths, times or worker counts. `NUMERICS` names the revision of our own mathematics; it is raised by whoever
changes a result's bits, and the versions of the libraries that compute stand beside it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import metadata
from typing import Any

NUMERICS = 2

LIBRARIES = ("torch", "transformers")
"""Libraries whose version may change a result's bits."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def digest(value: Any) -> str:
    """sha256 (hex) of `canonical_json`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def numerics() -> dict[str, str | int]:
    """What computes: part of every key, so that work of other versions never matches."""
    return {"counterweight": NUMERICS, **_versions()}
