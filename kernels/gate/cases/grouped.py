"""Rows of groups times weights whose sizes tiles divide, and any."""

from __future__ import annotations

import torch

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.grouped import BLOCKS, TOGETHER, grouped_linear_kernel


def _case(*, even: bool) -> Case:
    arithmetic = launch.arithmetic(torch.bfloat16)
    sizes = ("groups", "outputs", "inputs", "x_stride", "weight_stride")
    return Case(
        name="grouped_linear/bf16, even" if even else "grouped_linear/bf16",
        kernel=grouped_linear_kernel,
        types={
            **dict.fromkeys(("out", "x", "weight"), "*bf16"),
            **dict.fromkeys(("places", "bounds", "begins"), "*i64"),
            **dict.fromkeys(sizes, "i32"),
        },
        constants={
            "GROUPS": 256,
            "TOGETHER": TOGETHER,
            "EVEN": even,
            "TOKENS": BLOCKS["TOKENS"],
            "TILE": BLOCKS["TILE"],
            "DEPTH": BLOCKS["DEPTH"],
            "COMPUTE": arithmetic["COMPUTE"],
            "PRECISION": arithmetic["PRECISION"],
        },
        aligned=("out", "x", "weight", "outputs", "inputs", "x_stride", "weight_stride"),
        options={"num_warps": BLOCKS["num_warps"], "num_stages": BLOCKS["num_stages"]},
        required={80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",)},
    )


CASES = [_case(even=True), _case(even=False)]
