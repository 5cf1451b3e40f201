"""The dtypes of the safetensors format, as data: what a header says of a tensor, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredDtype:
    """word: the format's. itemsize: bytes of an element."""

    word: str
    itemsize: int
    is_floating_point: bool = False

    def __str__(self) -> str:
        return self.word


I64, I32, I16, I8, U8 = (
    StoredDtype(word, size) for word, size in (("I64", 8), ("I32", 4), ("I16", 2), ("I8", 1), ("U8", 1))
)
F64, F32, F16 = (StoredDtype(f"F{8 * size}", size, is_floating_point=True) for size in (8, 4, 2))
BF16 = StoredDtype("BF16", 2, is_floating_point=True)
BOOL = StoredDtype("BOOL", 1)
F8_E4M3 = StoredDtype("F8_E4M3", 1, is_floating_point=True)
"""Of codes alone: a checkpoint has it where its config says how they are decoded."""

DTYPES: Mapping[str, StoredDtype] = {dtype.word: dtype for dtype in (I64, F64, F32, I32, BF16, F16, I16, I8, U8, BOOL)}
"""Word -> dtype, of those read and written here, in the order in which the safetensors library writes them."""
