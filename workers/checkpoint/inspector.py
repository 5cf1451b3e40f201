"""The digest of a tensor's content, and whether its elements are finite, in one pass over its bytes.

What is hashed: the sha256 of the dtype's word, the shape, a line feed, and then the elements, row-major and
little-endian; for a bfloat16 matrix of 2 by 3, `BF16[2,3]` + LF + 12 bytes. Neither the name nor the place in
a file takes part: equal tensors have equal digests wherever they are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from counterweight.workers.checkpoint.dtypes import StoredDtype

if TYPE_CHECKING:
    from counterweight.workers.checkpoint.buffers import Bytes

# An infinity or a NaN has every bit of the exponent set: word -> (unsigned type of the same width, those bits).
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}

# The masked copy stays in the second-level cache: 7 GB/s in one thread, against 1.2 GB/s of sha256 beside it
# (AMD EPYC with SHA extensions).
_SCAN_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """sha256: hex, of what the module's page says. finite: no NaN and no infinity (True for integers and
    booleans)."""

    sha256: str
    finite: bool


class Inspector:
    """Digests a tensor's bytes as they come, in bounded memory."""

    def __init__(self, dtype: StoredDtype, shape: Sequence[int]) -> None:
        sizes = ",".join(map(str, shape))
        self._digest = hashlib.sha256(f"{dtype}[{sizes}]\n".encode())
        self._exponent = _EXPONENTS.get(dtype.word)
        self._finite = True

    def update(self, piece: Bytes) -> None:
        """Takes the next bytes, whole elements of them."""
        self._digest.update(piece.data)
        if self._exponent is None or not self._finite:
            return
        kind, exponent = self._exponent
        bits = piece.view(kind)
        mask = bits.dtype.type(exponent)
        step = _SCAN_BYTES // bits.itemsize
        for begin in range(0, bits.size, step):
            if int((bits[begin : begin + step] & mask).max()) == exponent:
                self._finite = False
                return

    def result(self) -> TensorDigest:
        """What was found in all bytes so far."""
        return TensorDigest(sha256=self._digest.hexdigest(), finite=self._finite)
