"""Hadamard transforms of the widths of Llama-3-8B and 70B: whole rows, heads, and a core with doublings."""

from __future__ import annotations

import triton.language as tl

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gpu import hadamard
from counterweight.kernels.hadamard import Hadamard


def _cases(name: str, transform: Hadamard, type_: str) -> list[Case]:
    """The passes of one transform of x, as `hadamard.transform` launches them."""
    passes = hadamard._passes(transform)
    cases = []
    for number, mixed in enumerate(passes):
        first, last = number == 0, number == len(passes) - 1
        tile, signed = mixed.tile(), first and transform.seed is not None
        types = {"x": type_ if first else "*fp32", "y": type_ if last else "*fp32", "signs": "*i8", "core": type_}
        types |= {"outers": "i32", "scale": "fp32"}
        absent = ([] if signed else ["signs"]) + ([] if mixed.core > 1 else ["core"])
        constants: dict[str, object] = {"WIDTH": transform.width, "CORE": mixed.core, "DOUBLINGS": mixed.doublings}
        constants |= {"INNER": mixed.inner, **tile, "SIGNED": signed}
        constants |= {"COMPUTE": {"*bf16": tl.bfloat16, "*fp16": tl.float16}[type_], "PRECISION": "ieee"}
        constants |= dict.fromkeys(absent)
        cases.append(
            Case(
                name=f"hadamard/{name}, pass {number + 1} of {len(passes)}",
                kernel=hadamard._mix,
                types={argument: kind for argument, kind in types.items() if argument not in absent},
                constants=constants,
                aligned=tuple(argument for argument in ("x", "y", "signs", "core") if argument not in absent),
                options={"num_warps": hadamard._warps(tile, mixed.doublings), "num_stages": 1},
            )
        )
    return cases


CASES = [
    *_cases("4096", Hadamard(size=4096, seed=0), "*bf16"),
    *_cases("14336 = 28 * 512", Hadamard(size=14336, seed=0), "*bf16"),
    *_cases("16384", Hadamard(size=16384), "*fp16"),
    *_cases("28672 = 28 * 1024", Hadamard(size=28672), "*bf16"),
    *_cases("11008 = 344 * 32", Hadamard(size=11008), "*fp16"),
    *_cases("heads of 128", Hadamard(size=32, inner=128), "*bf16"),
    *_cases("blocks of 128", Hadamard(size=128), "*bf16"),
]
