"""What formats of packed integer codes have in common: a layer is some tensors under suffixes of its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from counterweight.workers.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CODES, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
WORD = 32
"""Bits of a word."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A linear layer's tensors. codes, zeros: words, int32. scales: [groups, out]. groups: of each input, [in], or None for
    groups of equal length one behind the other."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code: so many as let the words of a row of zero points hold one for each output. CheckpointError for others than
        2, 4 and 8."""
        bits = WORD * self.zeros.shape[-1] / max(self.scales.shape[-1], 1)
        if bits not in (2, 4, 8):
            raise CheckpointError(f"codes of {bits:g} bits: expected 2, 4 or 8")
        return int(bits)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """decode: a layer -> its weight [out, in] float32."""

    decode: Callable[[PackedLayer], Tensor]

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors with each layer's weight in the place of its parts. CheckpointError, naming the layer, where
        the parts are not whole or do not fit together."""
        layers = [name.removesuffix(f".{CODES}") for name in tensors if name.endswith(f".{CODES}")]
        parts = {f"{layer}.{part}" for layer in layers for part in (CODES, ZEROS, SCALES, GROUPS)}
        plain = {name: tensor for name, tensor in tensors.items() if name not in parts}
        return plain | {f"{layer}.weight": self._weight(layer, tensors) for layer in layers}

    def _weight(self, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        try:
            codes, zeros, scales = (_part(tensors, layer, part) for part in (CODES, ZEROS, SCALES))
            return self.decode(PackedLayer(codes, zeros, scales, tensors.get(f"{layer}.{GROUPS}")))
        except CheckpointError as error:
            raise CheckpointError(f"{layer}: {error}") from error


def unpacked(words: Tensor, bits: int, order: Iterable[int]) -> Tensor:
    """[n, words] int32 -> the codes in them, [n, words * 32 / bits] int32. order: of the codes in a word, by their place from
    its lowest bits on."""
    import torch

    shifts = bits * torch.tensor(list(order), dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)


def dequantized(codes: Tensor, zeros: Tensor, layer: PackedLayer) -> Tensor:
    """codes [in, out], zeros [groups, out], both int32 -> scale * (code - zero), [out, in] float32. CheckpointError where they
    do not fit."""
    import torch

    inputs, count = codes.shape[0], layer.scales.shape[0]
    if codes.shape[1:] != layer.scales.shape[1:] or zeros.shape != layer.scales.shape:
        raise CheckpointError(
            f"codes {list(codes.shape)}, zero points {list(zeros.shape)}, scales {list(layer.scales.shape)}: "
            "expected [in, out] and twice [groups, out]"
        )
    groups = layer.groups
    if groups is None:
        if count == 0 or inputs % count:
            raise CheckpointError(f"{count} groups of {inputs} inputs: expected groups of one length")
        groups = torch.arange(count).repeat_interleave(inputs // count)
    if groups.shape != (inputs,) or bool(((groups < 0) | (groups >= count)).any()):
        raise CheckpointError(f"{GROUPS} {list(groups.shape)}: expected [{inputs}] of numbers below {count}")
    index = groups.long()
    return (layer.scales.float()[index] * (codes - zeros[index])).T.contiguous()


def _part(tensors: Mapping[str, Tensor], layer: str, part: str) -> Tensor:
    tensor = tensors.get(f"{layer}.{part}")
    if tensor is None or tensor.dim() != 2:
        raise CheckpointError(f"{part}: expected a matrix beside {CODES}")
    if tensor.is_floating_point() != (part == SCALES) or (part != SCALES and tensor.element_size() != WORD // 8):
        raise CheckpointError(f"{part}: {tensor.dtype}: expected {'floats' if part == SCALES else 'int32'}")
    return tensor
