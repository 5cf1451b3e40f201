"""One kernel with its compile-time choices made: what the gate compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHS = (80, 89, 90, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel, the types of its arguments and the values of its constants.

    name: unique, such as "weight_gemm/skinny int4 g128 m16". kernel: the @triton.jit function. types: of the runtime
    arguments, "*bf16", "*i32", "i32", "fp32". constants: every constexpr. aligned: the arguments that are divisible by 16,
    pointers and strides; without it there are no 16-byte loads. options: num_warps, num_stages, as in a launch.

    weights_per_iteration: weights that one program dequantizes in one turn of its hot loop; 0 when the kernel is not held to
    instructions per weight. required: SASS operations that must appear, by architecture, such as {90: ("HGMMA",)}. archs:
    what it is compiled for.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)
    weights_per_iteration: int = 0
    required: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    archs: tuple[int, ...] = ARCHS
