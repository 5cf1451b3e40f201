"""Products with one integer weight, in the tiles that `weight_gemm` chooses on each architecture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch

from counterweight.kernels.gate.case import ARCHS, Case
from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.layout import DECODE_TOKENS
from counterweight.kernels.gpu.partials import add_partials
from counterweight.kernels.gpu.weight_gemm import Tiling, decode_tiling, dense_tiling, weight_kernel

_WIDTHS = ("rows", "in_features", "out_features", "rank")  # of rows in memory

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}


def weight_cases(
    name: str,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bits: int = 4,
    block: int = 128,
    grouped: bool = True,
    asymmetric: bool = False,
    quantized: bool = False,
    up: torch.dtype | None = None,
    experts: bool = False,
    whole: bool = True,
    splits: int = 1,
    required: Mapping[int, tuple[str, ...]] | None = None,
    archs: tuple[int, ...] = ARCHS,
) -> list[Case]:
    """One case for each tile that is chosen for `tokens` tokens on some architectures."""

    decoding = tokens <= DECODE_TOKENS

    def tiling(arch: int) -> Tiling:
        if decoding:
            return decode_tiling(tokens, bits, dtype, arch // 10)
        return dense_tiling(tokens, dtype, block, arch // 10)

    float_name = f"*{_NAMES[dtype]}"
    types = {
        "values": float_name,
        "low": "*u8" if bits == 8 else "*i32",
        "scale": float_name,
        "out": float_name if splits == 1 else "*fp32",
        "count": "i32",
        "rows": "i32",
        "blocks": "i32",
        "in_features": "i32",
        "out_features": "i32",
        "rank": "i32",
    }
    if up is not None:
        types |= {"up": f"*{_NAMES[up]}", "projected": "*fp32"}
    optional = {
        "step": ("*fp32", quantized),
        "high": ("*i16", bits == 3),
        "offset": ("*u8", asymmetric),
        "bias": (float_name, True),
        "gates": (float_name, experts),
        "slots": ("*i32", experts),
        "expert_of_block": ("*i32", experts),
        "experts": ("i32", experts),
    }
    types |= {argument: type_ for argument, (type_, given) in optional.items() if given}
    constants: dict[str, object] = {argument: None for argument, (_, given) in optional.items() if not given}
    if up is None:
        constants |= {"up": None, "projected": None}
    cases = []
    for tile, same in groupby(archs, tiling):
        only = tuple(same)
        cases.append(
            Case(
                name=name if only == archs else f"{name} on {'/'.join(map(str, only))}",
                kernel=weight_kernel,
                types=types,
                constants={
                    **constants,
                    "BITS": bits,
                    "GROUPED": grouped,
                    "BLOCK": block,
                    "SPLITS": splits,
                    "SHARING": 2 if experts else 1,
                    "DECODING": decoding,
                    "WHOLE": whole,
                    "BM": tile.bm,
                    "BN": tile.bn,
                    "BK": tile.bk,
                    "BR": tile.br,
                    "COMPUTE": launch.arithmetic(dtype)["COMPUTE"],
                    "PRECISION": "ieee",
                    "ASM": True,
                },
                aligned=(
                    *(a for a in types if types[a].startswith("*")),
                    "rows",
                    "in_features",
                    "out_features",
                    "rank",
                ),
                options={"num_warps": tile.warps, "num_stages": tile.stages},
                weights_per_iteration=tile.bn * (block if decoding else tile.bk),
                required={arch: operations for arch, operations in (required or {}).items() if arch in only},
                archs=only,
            )
        )
    return cases


_TENSOR_CORES = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",)}
_bf16, _i8 = torch.bfloat16, torch.int8

CASES = [
    *weight_cases("weight_gemm/decode int4 g128 m8", 8, up=_bf16),
    *weight_cases("weight_gemm/decode int4 g128 m16", 16, up=_bf16, required=_TENSOR_CORES),
    *weight_cases("weight_gemm/decode int4 g128 m32", 32, up=_bf16, asymmetric=True),
    *weight_cases("weight_gemm/decode int4 g128 m16 split", 16, splits=4),
    *weight_cases("weight_gemm/decode int4 g128 m16 fp16", 16, dtype=torch.float16),
    *weight_cases("weight_gemm/decode int4 g128 m16 W4A8", 16, asymmetric=True, quantized=True, up=_i8),
    *weight_cases("weight_gemm/decode int4 channel m16", 16, grouped=False, up=_bf16),
    *weight_cases("weight_gemm/decode int4 channel m16 asymmetric", 16, grouped=False, asymmetric=True),
    *weight_cases("weight_gemm/decode int4 g64 m16", 16, block=64),
    *weight_cases("weight_gemm/decode int4 g32 m16", 16, block=32),
    *weight_cases("weight_gemm/decode int2 g128 m16", 16, bits=2, asymmetric=True, up=_i8),
    *weight_cases("weight_gemm/decode int3 g128 m16", 16, bits=3, up=_bf16),
    *weight_cases("weight_gemm/decode int3 g128 m32", 32, bits=3, asymmetric=True, up=_bf16),
    *weight_cases("weight_gemm/decode int8 g128 m16", 16, bits=8, asymmetric=True, up=_bf16),
    *weight_cases("weight_gemm/decode int8 channel m32", 32, bits=8, grouped=False, up=_bf16),
    *weight_cases("weight_gemm/decode int4 g128 m16 fp32", 16, dtype=torch.float32, up=torch.float32),
    *weight_cases("weight_gemm/prefill int4 g128 m64", 64, up=_bf16, asymmetric=True),
    *weight_cases("weight_gemm/prefill int4 g128 m128", 128, up=_bf16, asymmetric=True, archs=(90, 100)),
    *weight_cases("weight_gemm/prefill int4 g128", 256, up=_bf16, required=_TENSOR_CORES),
    *weight_cases("weight_gemm/prefill int4 channel W4A8", 256, grouped=False, quantized=True, up=_i8),
    *weight_cases("weight_gemm/prefill int4 g32 ragged", 256, block=32, asymmetric=True, whole=False),
    *weight_cases("weight_gemm/prefill int2 g128", 256, bits=2, asymmetric=True),
    *weight_cases("weight_gemm/prefill int3 g128", 256, bits=3, asymmetric=True, up=_bf16),
    *weight_cases("weight_gemm/prefill int8 channel", 256, bits=8, grouped=False, up=_bf16),
    *weight_cases("weight_gemm/prefill int4 g128 fp32", 256, dtype=torch.float32, up=torch.float32),
    Case(
        name="weight_gemm/add_partials",
        kernel=add_partials,
        types={"partials": "*fp32", "out": "*bf16", "size": "i32"},
        constants={"SPLITS": 8, "BLOCK": 1024},
        aligned=("partials", "out", "size"),
        options={"num_warps": 4},
    ),
]
