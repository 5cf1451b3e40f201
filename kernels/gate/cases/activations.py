"""Inputs of Llama-3-8B's layers: one token, a few, and many, for the weight kernel and for the integer kernel."""

from __future__ import annotations

import triton.language as tl

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gpu import activations

_POINTERS = {
    "x": "*bf16",
    "norm": "*bf16",
    "smooth": "*bf16",
    "down": "*bf16",
    "step": "*fp32",
    "values": "*bf16",
    "codes_step": "*fp32",
    "sums": "*fp32",
    "projected": "*fp32",
}
_NUMBERS = {
    "tokens": "i32",
    "in_features": "i32",
    "rank": "i32",
    "slice": "i32",
    "epsilon": "fp32",
    "clip": "fp32",
}


def _case(
    name: str,
    *,
    tokens: int,
    columns: int = 4096,
    rank: int = 64,
    bits: int = 8,
    norm: bool = False,
    smooth: bool = False,
    summed: int = 0,
    integer: bool = False,
    factor: str = "*bf16",
    emit: bool = True,
) -> Case:
    plan = activations._plan(tokens, columns, rank)
    stepped = factor == "*i8"
    present = {
        "norm": norm,
        "smooth": smooth,
        "down": rank > 0,
        "step": stepped,
        "codes_step": bits > 0,
        "sums": summed > 0,
        "projected": rank > 0,
    }
    types = {argument: kind for argument, kind in _POINTERS.items() if present.get(argument, True)}
    if rank:
        types["down"] = factor
    types["values"] = "*i8" if integer else "*bf16"
    constants = {
        "NORM": norm,
        "SMOOTH": smooth,
        "BITS": bits,
        "CLIPPED": bits > 0,
        "SMALLEST_STEP": 2.0**-7,
        "EMIT": emit,
        "SUMMED": summed,
        "BRANCH": rank > 0,
        "STEPPED": stepped,
        "BLOCK_M": plan.block_m,
        "BLOCK_K": plan.block_k,
        "SWEEP": plan.sweep,
        "BLOCK_R": plan.block_r,
        "COMPUTE": tl.bfloat16,
        "PRECISION": "ieee",
        **{argument: None for argument, there in present.items() if not there},
    }
    return Case(
        name=f"activations/{name}",
        kernel=activations._prepare,
        types={**types, **_NUMBERS},
        constants=constants,
        aligned=(*types, "in_features", "rank", "slice"),
        options={
            "num_warps": plan.warps,
            "num_stages": activations._STAGES,
            **({"maxnreg": activations._REGISTERS} if plan.block_m > 1 else {}),
        },
        required={90: ("HGMMA",)} if plan.block_m == 64 else {},
    )


CASES = [
    _case("weight kernel, 1 token, norm, no codes", tokens=1, bits=0, norm=True),
    _case("weight kernel, 1 token, A8, int8 factors", tokens=1, columns=14336, factor="*i8"),
    _case("weight kernel, 1 token, A8, no branch", tokens=1, rank=0, norm=True),
    _case("weight kernel, 16 tokens, A4, norm, smooth", tokens=16, bits=4, norm=True, smooth=True),
    _case("weight kernel, 16 tokens, rank 410", tokens=16, rank=410, bits=0, emit=False),
    _case("weight kernel, 2048 tokens, branch alone", tokens=2048, columns=14336, bits=0, emit=False),
    _case("integer kernel, 4096 tokens, A8", tokens=4096, columns=14336, integer=True),
    _case(
        "integer kernel, 4096 tokens, A4, all",
        tokens=4096,
        rank=410,
        bits=4,
        norm=True,
        smooth=True,
        summed=128,
        integer=True,
    ),
    _case("integer kernel, 4096 tokens, int8 factors", tokens=4096, norm=True, integer=True, factor="*i8"),
    _case("integer kernel, 4096 tokens, no branch", tokens=4096, columns=14336, rank=0, integer=True),
]
