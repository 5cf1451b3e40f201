"""Integer codes in the checkpoint: the `pack-quantized` layout of compressed-tensors 0.20, bit for bit.

A row of codes is one little-endian stream of bits: code i, stored with an offset of 2**(bits-1) so that it is
unsigned, takes the bits i*bits .. (i+1)*bits - 1. The stream is cut into int32 words; with 3 bits a code may straddle
two words. Weights are packed along the input dimension, zero points along the output dimension.

Eight codes are eight bytes, that is one int64, and eight packed codes are `bits` whole bytes. So both directions are
three mask-and-shift steps on int64 lanes, one per doubling of the run of packed bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.formats import QuantizedWeight

__all__ = ["CHECKPOINT_NAMES", "from_checkpoint", "pack", "packed_width", "to_checkpoint", "unpack"]

CHECKPOINT_NAMES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""Local names of a quantized linear layer's tensors; the last is there for asymmetric grids only."""

_BITS = (2, 3, 4, 8)
_CODES_PER_LANE = 8
_CODES_PER_UNIT = 32  # 32 codes fill exactly `bits` words
_MERGES = 3  # 8 codes -> 4 pairs -> 2 quads -> 1 octet


def packed_width(count: int, bits: int) -> int:
    """Number of int32 words that `count` codes of `bits` bits fill."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int, *, dim: int = 1) -> Tensor:
    """Packs signed codes [rows, columns] int8 along `dim` into int32 words, unused bits zero.

    Returns [rows, packed_width(columns)] for dim 1 and [packed_width(rows), columns] for dim 0. Raises ValueError for
    another dtype, number of dimensions or width of code, and for a code outside -2**(bits-1) .. 2**(bits-1) - 1.
    """
    _check_bits(bits)
    if codes.dtype is not torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes: {_describe(codes)}: expected int8 with 2 dimensions")
    half = 1 << (bits - 1)
    if codes.numel():
        low, high = (int(bound) for bound in codes.aminmax())
        if low < -half or high >= half:
            raise ValueError(f"codes: range {low} .. {high}: expected {-half} .. {half - 1} for {bits} bits")
    if _dim(dim) == 0:
        return pack(codes.T, bits).T.contiguous()
    rows, columns = codes.shape
    # Padding with the lowest code leaves zero bits behind, as in compressed-tensors.
    padded = functional.pad(codes, (0, -columns % _CODES_PER_UNIT), value=-half)
    lanes = padded.reshape(-1).view(torch.int64)
    lanes = (lanes ^ _repeat(half, 8)).bitwise_and_(_repeat((1 << bits) - 1, 8))
    for merge in range(_MERGES):
        width, run = 16 << merge, bits << merge
        filled = (1 << run) - 1
        upper = (lanes >> (width // 2 - run)).bitwise_and_(_repeat(filled << run, width))
        lanes.bitwise_and_(_repeat(filled, width)).bitwise_or_(upper)
    octets = lanes.view(torch.uint8).view(-1, _CODES_PER_LANE)[:, :bits]
    words = octets.reshape(-1).view(torch.int32).view(rows, padded.shape[1] // _CODES_PER_UNIT * bits)
    return words[:, : packed_width(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int, *, dim: int = 1) -> Tensor:
    """Inverse of `pack`: signed int8 codes, `count` of them along `dim`.

    Raises ValueError for another dtype or number of dimensions, and when the words are not those of `count` codes.
    """
    _check_bits(bits)
    if words.dtype is not torch.int32 or words.ndim != 2:
        raise ValueError(f"words: {_describe(words)}: expected int32 with 2 dimensions")
    if _dim(dim) == 0:
        return unpack(words.T, bits, count).T.contiguous()
    rows, width = words.shape
    if count < 0 or width != packed_width(count, bits):
        raise ValueError(f"words: {width} along the packed dimension: {count} codes fill {packed_width(count, bits)}")
    padded = functional.pad(words, (0, -width % bits))
    octets = padded.reshape(-1).view(torch.uint8).view(-1, bits)
    lanes = functional.pad(octets, (0, _CODES_PER_LANE - bits)).reshape(-1).view(torch.int64)
    for merge in reversed(range(_MERGES)):
        width, run = 16 << merge, bits << merge
        filled = (1 << run) - 1
        upper = (lanes << (width // 2 - run)).bitwise_and_(_repeat(filled << (width // 2), width))
        lanes.bitwise_and_(_repeat(filled, width)).bitwise_or_(upper)
    codes = lanes.view(torch.int8).view(rows, padded.shape[1] // bits * _CODES_PER_UNIT)
    half = 1 << (bits - 1)
    # With 8 bits the unsigned codes do not fit int8; there, flipping the top bit is the subtraction.
    signed = codes ^ -half if bits == 8 else codes - half
    return signed[:, :count].contiguous()


def to_checkpoint(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one quantized layer under their local names (see `CHECKPOINT_NAMES`).

    weight_packed int32 [out, words]; weight_scale [out, groups] in its own dtype; weight_shape int64 [2];
    weight_zero_point int32 [words, groups], packed along the output dimension, when the grid is asymmetric.
    """
    tensors = {
        "weight_packed": pack(weight.codes, weight.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack(weight.zero_point, weight.bits, dim=0)
    return tensors


def from_checkpoint(
    tensors: Mapping[str, Tensor], bits: int, group_size: int | None, symmetric: bool
) -> QuantizedWeight:
    """Inverse of `to_checkpoint` for tensors that nobody has checked yet.

    Raises ValueError naming the first tensor whose presence, dtype, shape or content contradicts the others or the
    scheme. Sizes are compared before anything is allocated from them.
    """
    _check_bits(bits)
    if group_size is not None and group_size <= 0:
        raise ValueError(f"group_size: {group_size}: expected a positive number of columns, or None")
    expected = set(CHECKPOINT_NAMES[:3] if symmetric else CHECKPOINT_NAMES)
    if set(tensors) != expected:
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(f"tensors of a quantized layer: missing {missing}, not expected {unknown}")
    rows, columns = _read_shape(tensors["weight_shape"])
    groups = 1 if group_size is None else -(-columns // group_size)
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    _expect(packed, "weight_packed", (torch.int32,), (rows, packed_width(columns, bits)))
    _expect(scale, "weight_scale", (torch.bfloat16, torch.float16, torch.float32), (rows, groups))
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weight_scale: holds NaN or infinity: expected finite scales")
    zero_point = None
    if not symmetric:
        words = tensors["weight_zero_point"]
        _expect(words, "weight_zero_point", (torch.int32,), (packed_width(rows, bits), groups))
        zero_point = unpack(words, bits, rows, dim=0)
    return QuantizedWeight(
        codes=unpack(packed, bits, columns), scale=scale, zero_point=zero_point, bits=bits, group_size=group_size
    )


def _read_shape(shape: Tensor) -> tuple[int, int]:
    _expect(shape, "weight_shape", (torch.int64,), (2,))
    rows, columns = (int(size) for size in shape)
    if rows <= 0 or columns <= 0:
        raise ValueError(f"weight_shape: [{rows}, {columns}]: expected two positive sizes")
    return rows, columns


def _expect(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: {_describe(tensor)}: expected {wanted} {list(shape)}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise ValueError(f"bits: {bits}: expected 2, 3, 4 or 8")


def _dim(dim: int) -> int:
    if dim not in (0, 1):
        raise ValueError(f"dim: {dim}: expected 0 or 1")
    return dim


def _repeat(pattern: int, width: int) -> int:
    """An int64 constant: `pattern` in each field of `width` bits."""
    unsigned = sum(pattern << start for start in range(0, 64, width))
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned
