"""What kernels are given: weights and inputs arranged for the GPU. Made once at load, or once per call; never stored.

A weight kernel does not subtract zero points from codes. It forms MAGIC + u, with u = code + 2**(bits-1) >= 0, by putting
u's bits in the mantissa of a float (bfloat16 128 + u, float16 1024 + u), two codes of one word at a time, and corrects the
dot product by the sums of the inputs:

    y[m, n] = sum_g scale[n, g] * (sum_{k in g} (MAGIC + u[n, k]) x[m, k]  -  (MAGIC + offset[n, g]) * sums[m, g])

The two codes that come out of a word together are not neighbours but lie half a word apart. Instead of putting weights in
order, which would cost instructions for every weight and token, inputs are written in the weights' order: see
`permute_columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.formats import QuantizedWeight
from counterweight.kernels.packing import pack

__all__ = [
    "DECODE_TOKENS",
    "PackedWeight",
    "PreparedInput",
    "permute_columns",
    "permuted_run",
    "prepare_weight",
    "stack_weights",
    "unsupported",
]

DECODE_TOKENS = 32
"""Tokens up to which inputs are best prepared for the kernels of decoding (permuted, with sums); beyond, left in order."""

_TILE = 128  # rows and columns of a stored weight are whole tiles of it: kernels need no masks on weights
_GROUP_SIZES = (32, 64, 128)
_RUNS = {2: 16, 3: 16, 4: 8, 8: 2}
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A quantized weight [out, in] as the kernels read it: padded to [rows, columns], multiples of 128, with codes u = 0 under
    a scale of 0.

    planes: the codes u, offset to be unsigned. 2 and 4 bits: one, int32 [rows, columns * bits / 32], as in the checkpoint;
    3 bits: two, the lower two bits of every code as a 2-bit plane, then the top bits, int16 [rows, columns / 16], bit i
    of word j for column 16j + i; 8 bits: one, int8 [rows, columns], signed codes as they are.
    scale: [groups, rows], the checkpoint's dtype; transposed, so that a tile's scales are one piece of memory. offset:
    [groups, rows] float32, 2**(bits-1) + zero point, or None on a symmetric grid (then it is 2**(bits-1)); for 8 bits the zero
    point alone (then it is 0). group_size: columns that share a scale; `columns` per channel.
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
        """Columns that a kernel multiplies at a time, and over which inputs are summed: a group, at most 128."""
        return min(self.group_size, _TILE)

    @property
    def experts(self) -> int | None:
        """Number of experts whose weights these are, None for a single weight."""
        return int(self.scale.shape[0]) if self.scale.ndim == 3 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedInput:
    """A layer's input x [tokens, in] after one pass over it.

    values: x itself, or its integer codes, in x's dtype (codes are exact there) for the weight kernel, or codes as int8 for
    the integer kernel. permuted: whether columns are in the order of the weight's words (`permute_columns`) and padded with
    zeros: [tokens, weight.columns], for decoding; else [tokens, in] in natural order. step: [tokens] float32, what a code
    stands for, or None when x is not quantized. sums: [tokens, weight.columns / weight.block] float32 of `values` over each
    block of the weight; needed with `permuted`. projected: [tokens, rank] float32, down @ x of the unquantized x, times the
    factors' steps; None without a branch.
    """

    values: Tensor
    permuted: bool
    step: Tensor | None
    sums: Tensor | None
    projected: Tensor | None

    @property
    def tokens(self) -> int:
        return int(self.values.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


def unsupported(weight: QuantizedWeight) -> str | None:
    """Why `prepare_weight` refuses this weight, or None when it does not."""
    if weight.bits not in _RUNS:
        return f"bits: {weight.bits}: expected one of {sorted(_RUNS)}"
    if weight.group_size is not None and weight.group_size not in _GROUP_SIZES:
        return f"group_size: {weight.group_size}: expected one of {list(_GROUP_SIZES)}, or None"
    if weight.scale.dtype not in _SCALE_DTYPES:
        return f"scale: {weight.scale.dtype}: expected float16, bfloat16 or float32"
    return None


def prepare_weight(weight: QuantizedWeight) -> PackedWeight:
    """Arranges a weight for the kernels, on the device where it lies. Raises ValueError with the reason of `unsupported`."""
    reason = unsupported(weight)
    if reason is not None:
        raise ValueError(reason)
    out_features, in_features = weight.codes.shape
    rows, columns = (_whole_tiles(size) for size in (out_features, in_features))
    group_size = columns if weight.group_size is None else weight.group_size
    half = 1 << (weight.bits - 1)
    # Padding with the lowest code makes u = 0; signed 8-bit codes are their own u.
    codes = _pad(weight.codes, rows, columns, value=0 if weight.bits == 8 else -half)
    offset = None
    if weight.zero_point is not None:
        first = 0 if weight.bits == 8 else half
        offset = _pad(weight.zero_point.float() + first, rows, columns // group_size).T.contiguous()
    return PackedWeight(
        planes=_planes(codes, weight.bits),
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


def permuted_run(bits: int) -> int:
    """Length R of the runs of columns that `permute_columns` reorders: place p of a run holds column p // 2 + p % 2 * R / 2."""
    return _RUNS[bits]


def permute_columns(x: Tensor, bits: int) -> Tensor:
    """x [..., columns] in the order of a weight's words; columns is a multiple of `permuted_run(bits)`.

    Within each run, the columns of its first half alternate with those of its second: 0, 4, 1, 5, 2, 6, 3, 7 for 4 bits.
    """
    run = _RUNS[bits]
    runs = x.reshape(*x.shape[:-1], x.shape[-1] // run, 2, run // 2)
    return runs.transpose(-1, -2).reshape(x.shape)


def _planes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    if bits == 8:
        return (codes.contiguous(),)
    if bits != 3:
        return (pack(codes, bits),)
    unsigned = codes + 4
    top = (unsigned >> 2).to(torch.int32).unflatten(1, (-1, 16)) << torch.arange(16, device=codes.device)
    return pack((unsigned & 3) - 2, 2), top.sum(2).to(torch.int16)


def _pad(tensor: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    padding = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return functional.pad(tensor, padding, value=value) if any(padding) else tensor


def _whole_tiles(size: int) -> int:
    return -(-size // _TILE) * _TILE


def _kind(weight: PackedWeight) -> tuple[object, ...]:
    sizes = (weight.out_features, weight.in_features, weight.bits, weight.group_size)
    return (*sizes, weight.scale.dtype, "symmetric" if weight.offset is None else "asymmetric")
