"""What kernels are given: weights and inputs arranged for the GPU. Made once at load, or once per call; never stored.

A weight kernel makes floats of integer codes in registers, two at a time. It puts the bits of u = code + 2**(bits-1) >= 0
into the mantissas of a pair of 16-bit floats, which then hold MAGIC + u (bfloat16: 128 + u, float16: 1024 + u), and subtracts
MAGIC + offset from both, which leaves the exact integers code - zero point. The two codes that come out of a 32-bit word
together lie half a word apart; words are packed such that these two are neighbours in the weight (see `paired_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.weights.packing import pack
from counterweight.kernels.weights.uniform import UniformWeight

__all__ = [
    "DECODE_TOKENS",
    "PackedWeight",
    "PreparedInput",
    "paired_columns",
    "prepare_weight",
    "stack_weights",
    "unsupported",
]

DECODE_TOKENS = 32
"""Tokens up to which the decoding kernel multiplies; beyond, that of prefill."""

_TILE = 128  # rows and columns of a stored weight are whole tiles of it: kernels need no masks on weights
_GROUP_SIZES = (32, 64, 128)
_BITS = (2, 3, 4, 8)
_CODES_PER_WORD = {2: 16, 3: 16, 4: 8}
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A quantized weight [out, in] as the kernels read it: padded to [rows, columns], multiples of 128, with codes u = 0 under
    a scale of 0.

    planes: the codes u, in the order of `paired_columns` within each word. 2 and 4 bits: one plane, int32
    [rows, columns * bits / 32]; 3 bits: two, the lower two bits of every code as a 2-bit plane, then the top bits, int16
    [rows, columns / 16], bit i of a word for the i-th code of its 16; 8 bits: one, uint8 [rows, columns], in natural order.
    scale: [groups, rows], the checkpoint's dtype; transposed, so that a tile's scales are one piece of memory. offset:
    [groups, rows] uint8, 2**(bits-1) + zero point, or None on a symmetric grid, where it is 2**(bits-1). group_size: columns
    that share a scale; `columns` per channel.
    Weights of several experts have one more dimension, the experts', before all others.
    """

    planes: tuple[Tensor, ...]
    scale: Tensor
    offset: Tensor | None
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def groups(self) -> int:
        return int(self.scale.shape[-2])

    @property
    def rows(self) -> int:
        """out_features, rounded up to whole tiles."""
        return int(self.scale.shape[-1])

    @property
    def columns(self) -> int:
        """in_features, rounded up to whole tiles."""
        return self.groups * self.group_size

    @property
    def block(self) -> int:
        """Columns that a kernel multiplies at a time: a group, at most 128."""
        return min(self.group_size, _TILE)

    @property
    def experts(self) -> int | None:
        """Number of experts whose weights these are, None for a single weight."""
        return int(self.scale.shape[0]) if self.scale.ndim == 3 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedInput:
    """A layer's input x [tokens, in] after one pass over it.

    values: x itself, or its integer codes, [tokens, in]: in x's dtype (codes are exact there) for the weight kernel, int8 for
    the integer kernel. step: [tokens] float32, what a code stands for, or None when x is not quantized. sums: [tokens, blocks]
    float32 of `values` over each block of the weight, for the integer kernel on a weight with zero points; otherwise None.
    projected: [tokens, rank] float32, down @ x of the unquantized x, times the factors' steps; None without a branch.
    """

    values: Tensor
    step: Tensor | None
    sums: Tensor | None
    projected: Tensor | None

    @property
    def tokens(self) -> int:
        return int(self.values.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


def unsupported(weight: UniformWeight) -> str | None:
    """Why `prepare_weight` refuses this weight, or None when it does not."""
    if weight.bits not in _BITS:
        return f"bits: {weight.bits}: expected one of {list(_BITS)}"
    if weight.group_size is not None and weight.group_size not in _GROUP_SIZES:
        return f"group_size: {weight.group_size}: expected one of {list(_GROUP_SIZES)}, or None"
    if weight.scale.dtype not in _SCALE_DTYPES:
        return f"scale: {weight.scale.dtype}: expected float16, bfloat16 or float32"
    return None


def prepare_weight(weight: UniformWeight) -> PackedWeight:
    """Arranges a weight for the kernels, on the device where it lies. Raises ValueError with the reason of `unsupported`."""
    reason = unsupported(weight)
    if reason is not None:
        raise ValueError(reason)
    out_features, in_features = weight.codes.shape
    rows, columns = (_whole_tiles(size) for size in (out_features, in_features))
    group_size = columns if weight.group_size is None else weight.group_size
    half = 1 << (weight.bits - 1)
    unsigned = _pad(weight.codes.short() + half, rows, columns).to(torch.uint8)
    offset = None
    if weight.zero_point is not None:
        offset = _pad(weight.zero_point.short() + half, rows, columns // group_size).to(torch.uint8).T.contiguous()
    return PackedWeight(
        planes=_planes(unsigned, weight.bits),
        scale=_pad(weight.scale, rows, columns // group_size).T.contiguous(),
        offset=offset,
        bits=weight.bits,
        group_size=group_size,
        out_features=out_features,
        in_features=in_features,
    )


def stack_weights(weights: Sequence[PackedWeight]) -> PackedWeight:
    """The weights of several experts as one. Raises ValueError unless they agree in shape, bits, groups and kind of grid."""
    first = weights[0]
    for index, weight in enumerate(weights):
        if _kind(weight) != _kind(first):
            raise ValueError(f"weight of expert {index}: {_kind(weight)}: expected {_kind(first)}, like expert 0")
    offsets = [weight.offset for weight in weights if weight.offset is not None]
    return PackedWeight(
        planes=tuple(torch.stack(planes) for planes in zip(*(weight.planes for weight in weights), strict=True)),
        scale=torch.stack([weight.scale for weight in weights]),
        offset=torch.stack(offsets) if offsets else None,
        bits=first.bits,
        group_size=first.group_size,
        out_features=first.out_features,
        in_features=first.in_features,
    )


def paired_columns(values: Tensor, bits: int) -> Tensor:
    """values [..., columns] in the order in which a word's fields hold them, lowest first; columns is a multiple of a word's.

    Field f of the lower half of a word is column 2f, field f of the upper half column 2f + 1; for 4 bits the order is
    0, 2, 4, 6, 1, 3, 5, 7.
    """
    words: Tensor = values.unflatten(-1, (-1, _CODES_PER_WORD[bits] // 2, 2))
    return words.transpose(-1, -2).reshape(values.shape)


def _planes(unsigned: Tensor, bits: int) -> tuple[Tensor, ...]:
    """unsigned: u [rows, columns] uint8."""
    if bits == 8:
        return (unsigned.contiguous(),)
    codes = paired_columns(unsigned, bits)
    if bits != 3:
        return (_packed(codes, bits),)
    top = (codes >> 2).to(torch.int32).unflatten(1, (-1, 16)) << torch.arange(16, device=codes.device)
    return _packed(codes & 3, 2), top.sum(2).to(torch.int16)


def _packed(unsigned: Tensor, bits: int) -> Tensor:
    """int32 words of fields of `bits` bits; `pack` takes signed codes."""
    return pack(unsigned.to(torch.int8) - (1 << (bits - 1)), bits)


def _pad(tensor: Tensor, rows: int, columns: int) -> Tensor:
    padding = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return functional.pad(tensor, padding) if any(padding) else tensor


def _whole_tiles(size: int) -> int:
    return -(-size // _TILE) * _TILE


def _kind(weight: PackedWeight) -> tuple[object, ...]:
    sizes = (weight.out_features, weight.in_features, weight.bits, weight.group_size)
    return (*sizes, weight.scale.dtype, "symmetric" if weight.offset is None else "asymmetric")
