"""The integer kernel on layers of Llama-3-8B: W4A8 and W4A4 (int4 codes of x are int8 there too), and W8A8."""

from __future__ import annotations

import triton.language as tl

from counterweight.kernels.gate.case import ARCHS, Case
from counterweight.kernels.gpu import integer_gemm

_POINTERS = {
    "x": "*i8",
    "step": "*fp32",
    "sums": "*fp32",
    "codes": "*i8",
    "scale": "*bf16",
    "zero_point": "*i8",
    "projected": "*fp32",
    "up": "*bf16",
    "bias": "*bf16",
    "y": "*bf16",
}
_OPERATIONS = {80: "IMMA", 89: "IMMA", 90: "IGMMA"}
_SIZES = ("tokens", "out_features", "in_features", "blocks", "rank")


def _cases(
    name: str,
    *,
    tokens: int,
    bits: int,
    group: int,
    zero_point: bool = False,
    whole: bool = True,
    up: str | None = "*bf16",
) -> list[Case]:
    """A launch for `tokens` tokens, one case for each choice of tiles among architectures; group 0 is per channel."""
    absent = ([] if zero_point else ["sums", "zero_point"]) + ([] if up else ["up", "projected"])
    types = {argument: kind for argument, kind in _POINTERS.items() if argument not in absent}
    if up:
        types["up"] = up
    constants = {
        "PACKED": bits < 8,
        "UNIT": integer_gemm._unit(bits, group, 2 if group else 1),
        "BLOCK": min(group or 128, 128),
        "GROUP": group,
        "WHOLE": whole,
        "SHIFTED": zero_point,
        "BRANCH": up is not None,
        "BIASED": True,
        "COMPUTE": tl.bfloat16,
        "PRECISION": "ieee",
        "ASM": True,
        **dict.fromkeys(absent),
    }
    return [
        Case(
            name=f"integer_gemm/{name}, sm_{arch}",
            kernel=integer_gemm._multiply,
            types={**types, **dict.fromkeys(_SIZES, "i32")},
            constants={**constants, **integer_gemm._blocks(tokens, arch)},
            aligned=(*types, "out_features", "in_features", "rank"),
            options={"num_warps": 8, "num_stages": integer_gemm._stages(arch)},
            required={arch: (_OPERATIONS[arch],)} if arch in _OPERATIONS else {},
            archs=(arch,),
        )
        for arch in ARCHS
    ]


CASES = [
    *_cases("int4 g128", tokens=4096, bits=4, group=128),
    *_cases("int4 g128, int8 factors", tokens=4096, bits=4, group=128, up="*i8"),
    *_cases("int4 g128, asymmetric", tokens=4096, bits=4, group=128, zero_point=True),
    *_cases("int4 per channel", tokens=4096, bits=4, group=0),
    *_cases("int4 per channel, asymmetric, ragged", tokens=4096, bits=4, group=0, zero_point=True, whole=False),
    *_cases("int4 g32", tokens=4096, bits=4, group=32),
    *_cases("int4 g64, 100 tokens", tokens=100, bits=4, group=64),
    *_cases("int4 g128, 64 tokens, no branch", tokens=64, bits=4, group=128, up=None),
    *_cases("int8 per channel", tokens=4096, bits=8, group=0),
    *_cases("int8 g128", tokens=4096, bits=8, group=128),
]
