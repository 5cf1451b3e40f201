"""GPTQ's format, of AutoGPTQ, GPTQModel and AutoRound: codes in words along the inputs, zero points along the outputs.

Of a layer [out, in] with codes of b bits: qweight [in * b / 32, out] int32, qzeros [groups, out * b / 32] int32, scales
[groups, out] and g_idx [in], the group of each input: weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), g = g_idx[i].
The first version of the format (`gptq`) stores zero points less one, word by word; `gptq_v2` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from counterweight.workers.foreign.format import WORD, PackedFormat, PackedLayer, dequantized, unpacked

if TYPE_CHECKING:
    from torch import Tensor

_LESS_ONE: Mapping[object, bool] = {
    "gptq": True,
    "gptq_v2": False,
    "auto_round:auto_gptq": True,
    "auto_round": False,
    "auto_round:gptqmodel": False,
}
"""What a config calls the format -> whether zero points are stored less one."""


def gptq(quantization: Mapping[str, object]) -> PackedFormat | None:
    """The format, where a `quantization_config` speaks of it."""
    method = quantization.get("quant_method")
    if method == "gptq":
        called = quantization.get("checkpoint_format", quantization.get("format", "gptq"))
    elif method == "auto-round":
        called = quantization.get("packing_format", "auto_round")
    else:
        return None
    if not isinstance(called, str) or called not in _LESS_ONE:
        return None
    less_one = _LESS_ONE[called]
    return PackedFormat(lambda layer: _decode(layer, less_one=less_one))


def _decode(layer: PackedLayer, *, less_one: bool) -> Tensor:
    import torch

    bits = layer.bits
    order = range(WORD // bits)
    zeros = layer.zeros.long()
    if less_one:  # of every code in a word at once, as it was taken away: a carry is a borrow's inverse
        zeros = zeros + sum(1 << bits * place for place in order)
    codes = unpacked(layer.codes.T, bits, order).T
    return dequantized(codes, unpacked(_words(zeros), bits, order).to(torch.int32), layer)


def _words(values: Tensor) -> Tensor:
    """int64 -> their lower 32 bits, still int64, none negative."""
    return values & 0xFFFFFFFF
