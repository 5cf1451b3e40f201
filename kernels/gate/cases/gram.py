"""Inputs of any width; a last tile is masked, and so are all."""

from __future__ import annotations

import torch

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.gram import BLOCKS_16_BIT, BLOCKS_FLOAT32, STRIP, gram_kernel

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _case(dtype: torch.dtype, *, packed: bool) -> Case:
    blocks = BLOCKS_FLOAT32 if dtype is torch.float32 else BLOCKS_16_BIT
    arithmetic = launch.arithmetic(dtype)
    return Case(
        name=f"gram/{_NAMES[dtype]}" + ("" if packed else ", two inputs"),
        kernel=gram_kernel,
        types={
            "total": "*fp64",
            "x": f"*{_NAMES[dtype]}",
            "y": f"*{_NAMES[dtype]}",
            **dict.fromkeys(("tokens", "x_width", "y_width", "x_stride", "y_stride"), "i32"),
        },
        constants={
            "PACKED": packed,
            "STRIP": STRIP,
            "TOKENS": blocks["TOKENS"],
            "TILE": blocks["TILE"],
            "COMPUTE": arithmetic["COMPUTE"],
            "PRECISION": arithmetic["PRECISION"],
        },
        aligned=("total", "x", "y", "x_width", "y_width", "x_stride", "y_stride"),
        options={"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"]},
        required={80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",)} if dtype is torch.bfloat16 else {},
    )


CASES = [
    _case(torch.bfloat16, packed=True),
    _case(torch.float32, packed=True),
    _case(torch.bfloat16, packed=False),
]
