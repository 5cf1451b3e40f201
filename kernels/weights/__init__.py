"""How a linear layer's weight can be stored: one file a format, found by the `kind` that an artifact's ledger names."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module

from counterweight.kernels.weights.stored_weight import StoredWeight

__all__ = ["StoredWeight", "format_of", "formats"]


@cache
def formats() -> Mapping[str, type[StoredWeight]]:
    """kind -> class, of every format that a file of this folder defines."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    found: dict[str, type[StoredWeight]] = {}
    for one in StoredWeight.__subclasses__():
        if one.kind in found:
            raise ValueError(f"kind: {one.kind!r}: expected one that {found[one.kind].__name__} does not have")
        found[one.kind] = one
    return found


def format_of(kind: str) -> type[StoredWeight]:
    """The format of this kind; ValueError, listing the known ones, for another."""
    known = formats()
    if kind not in known:
        raise ValueError(f"kind: {kind!r}: expected one of {', '.join(sorted(known))}")
    return known[kind]
