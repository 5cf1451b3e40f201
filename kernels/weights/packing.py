"""Integer codes in the checkpoint: the `pack-quantized` layout of compressed-tensors 0.20, bit for bit.

A row of codes is one little-endian stream of bits: code i, stored with an offset of 2**(bits-1) so that it is
unsigned, takes the bits i*bits .. (i+1)*bits - 1. The stream is cut into int32 words; with 3 bits a code may straddle
two words. Weights are packed along the input dimension, zero points along the output dimension.

Eight codes are eight bytes, that is one int64, and eight packed codes are `bits` whole bytes. So both directions are
three mask-and-shift steps on int64 lanes, one per doubling of the run of packed bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.weights.stored_weight import describe

__all__ = ["pack", "packed_width", "unpack"]

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
        raise ValueError(f"codes: {describe(codes)}: expected int8 with 2 dimensions")
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
        raise ValueError(f"words: {describe(words)}: expected int32 with 2 dimensions")
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
