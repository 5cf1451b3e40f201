"""Products with the integer weights of several experts; the kernel is that of `weight_gemm`, with slots."""

from __future__ import annotations

import torch

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gate.cases.weight_gemm import weight_cases
from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.experts import project_kernel, projection_tiling

_bf16 = torch.bfloat16


def _projection(block: int, down: str) -> Case:
    tile = projection_tiling(block)
    return Case(
        name=f"experts/project {down} m{block}",
        kernel=project_kernel,
        types={
            "x": "*bf16",
            "down": f"*{down}",
            "out": "*fp32",
            "slots": "*i32",
            "expert_of_block": "*i32",
            "count": "i32",
            "experts": "i32",
            "rank": "i32",
            "in_features": "i32",
        },
        constants={
            "SPLITS": 4,
            "SHARING": 2,
            "BM": tile.bm,
            "BN": tile.bn,
            "BR": tile.bk,
            "COMPUTE": launch.arithmetic(_bf16)["COMPUTE"],
            "PRECISION": "ieee",
        },
        aligned=("x", "down", "out", "slots", "expert_of_block", "rank", "in_features"),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


CASES = [
    *weight_cases("experts/decode int4 g128 m8", 8, up=_bf16, experts=True),
    *weight_cases("experts/decode int4 g128 m16", 16, up=_bf16, experts=True),
    *weight_cases("experts/decode int4 g128 m32", 32, up=_bf16, experts=True, asymmetric=True),
    *weight_cases("experts/decode int3 g128 m16", 16, bits=3, up=_bf16, experts=True),
    *weight_cases("experts/prefill int4 g128 m64", 64, up=_bf16, experts=True),
    *weight_cases("experts/prefill int4 g128", 256, up=_bf16, experts=True, asymmetric=True),
    _projection(8, "bf16"),
    _projection(32, "i8"),
    _projection(64, "bf16"),
    _projection(256, "bf16"),
]
