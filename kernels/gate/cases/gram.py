"""Inputs of widths that tiles divide, and of any."""

from __future__ import annotations

from functools import partial

import torch

from counterweight.kernels.gate.case import ARCHS, Case
from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.gram import STRIP, blocks_of, gram_kernel

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _case(dtype: torch.dtype, *, packed: bool, even: bool, major: int, grouped: bool = False) -> Case:
    """major: of the compute capabilities that it is compiled for; others of that dtype have the same blocks."""
    blocks = blocks_of(dtype, major)
    arithmetic = launch.arithmetic(dtype)
    name = [
        "gram/" + _NAMES[dtype],
        *(["Hopper"] if major == 9 else []),
        *([] if packed else ["two inputs"]),
        *(["even"] if even else []),
        *(["groups"] if grouped else []),
    ]
    return Case(
        name=", ".join(name),
        kernel=gram_kernel,
        types={
            "total": "*fp64",
            "x": f"*{_NAMES[dtype]}",
            "y": f"*{_NAMES[dtype]}",
            **dict.fromkeys(("tokens", "x_width", "y_width", "x_stride", "y_stride"), "i32"),
            **({"places": "*i64", "bounds": "*i64"} if grouped else {}),
        },
        constants={
            **({} if grouped else {"places": None, "bounds": None}),
            "PACKED": packed,
            "EVEN": even,
            "STRIP": STRIP,
            "TOKENS": blocks["TOKENS"],
            "TILE": blocks["TILE"],
            "COMPUTE": arithmetic["COMPUTE"],
            "PRECISION": arithmetic["PRECISION"],
        },
        aligned=("total", "x", "y", "x_width", "y_width", "x_stride", "y_stride"),
        options={"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"]},
        required={80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",)} if dtype is torch.bfloat16 else {},
        archs=tuple(arch for arch in ARCHS if blocks_of(dtype, arch // 10) == blocks),
    )


_BF16 = partial(_case, torch.bfloat16)

CASES = [
    _BF16(packed=True, even=True, major=8),
    _BF16(packed=False, even=False, major=8),
    _BF16(packed=True, even=True, major=9),
    _BF16(packed=True, even=False, major=9),
    _BF16(packed=False, even=True, major=9),
    _BF16(packed=True, even=True, major=9, grouped=True),
    _case(torch.float32, packed=True, even=False, major=8),
]
