"""AWQ's format (`gemm`), of AutoAWQ and AutoRound: codes and zero points in words along the outputs, in an order of its own.

Of a layer [out, in] in 4 bits: qweight [in, out / 8] int32, qzeros [groups, out / 8] int32, scales [groups, out].
weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), groups of equal length one behind the other. From its lowest bits on, a
word has its eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from counterweight.workers.errors import CheckpointError
from counterweight.workers.foreign.format import PackedFormat, PackedLayer, dequantized, unpacked

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of each of a word's outputs: its place from the lowest bits on."""


def awq(quantization: Mapping[str, object]) -> PackedFormat | None:
    """The format, where a `quantization_config` speaks of it."""
    method = quantization.get("quant_method")
    if method == "awq" and str(quantization.get("version", "gemm")).lower() == "gemm":
        return PackedFormat(_decode)
    if method == "auto-round" and quantization.get("packing_format") == "auto_round:auto_awq":
        return PackedFormat(_decode)
    return None


def _decode(layer: PackedLayer) -> Tensor:
    if layer.bits != BITS:
        raise CheckpointError(f"codes of {layer.bits} bits: expected {BITS}")
    codes, zeros = (unpacked(words, BITS, _PLACES) for words in (layer.codes, layer.zeros))
    return dequantized(codes, zeros, layer)
