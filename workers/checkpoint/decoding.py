"""Encoded weights as numbers: what each encoding's codes and scales stand for.

An encoding says in its own file which tensors of a checkpoint it is, from headers alone; its `decode` here needs torch.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from counterweight.workers.checkpoint.block_scaled import BlockScaling
from counterweight.workers.checkpoint.encoding import Encoding
from counterweight.workers.checkpoint.mxfp4 import BLOCK, MAGNITUDES, Mxfp4

DECODED = torch.bfloat16
"""Of every weight; `encoding.DECODED` is the format's word for it."""

_BIAS = 127
_NAN = 255


@singledispatch
def decode(encoding: Encoding, codes: Tensor, scales: Tensor) -> Tensor:
    """One weight, bfloat16. Codes and scales that stand for no numbers come out as no finite numbers."""
    raise TypeError(f"encoding: {type(encoding).__name__}: expected one that is decoded here")


@decode.register
def _block_scaled(encoding: BlockScaling, codes: Tensor, scales: Tensor) -> Tensor:
    """codes [out, in] float8, scales [ceil(out / rows), ceil(in / columns)] float32 -> the weight [out, in] bfloat16.

    Products in float32, rounded once. Beside both, one row of blocks is held in float32. NaN in codes or scales and
    products beyond bfloat16 come out as no finite numbers.
    """
    weight = torch.empty(codes.shape, dtype=DECODED)
    for place, start in enumerate(range(0, len(codes), encoding.rows)):
        rows = slice(start, start + encoding.rows)
        spread = scales[place].repeat_interleave(encoding.columns)[: codes.shape[1]]
        weight[rows] = codes[rows].float() * spread
    return weight


@decode.register
def _mxfp4(encoding: Mxfp4, codes: Tensor, scales: Tensor) -> Tensor:
    """codes [experts, out, in / 32, 16] uint8, scales [experts, out, in / 32] uint8 -> [experts, in, out] bfloat16.

    Beside both, one expert is held in float64.
    """
    experts, out, groups, _ = codes.shape
    values = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.float64)
    exponents = torch.arange(256, dtype=torch.float64) - _BIAS
    factors = exponents.exp2().index_fill(0, torch.tensor(_NAN), torch.nan)
    weight = torch.empty(experts, groups * BLOCK, out, dtype=DECODED)
    for expert in range(experts):
        pairs = torch.stack((codes[expert] & 15, codes[expert] >> 4), dim=-1).flatten(-2)  # [out, groups, 32]
        decoded = values[pairs.int()] * factors[scales[expert].int()].unsqueeze(-1)
        weight[expert] = decoded.flatten(-2).T
    return weight
