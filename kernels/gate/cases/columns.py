"""Blocks of `MOST_COLUMNS` columns, as wide as they come."""

from __future__ import annotations

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gpu.columns import CHANNELS, MOST_COLUMNS, WARPS, columns_kernel

_MATRICES = ("codes", "error", "base", "start")
_POINTERS = (*_MATRICES, "within", "steps", "zeros")
_STRIDES = (*(f"{matrix}_stride" for matrix in (*_MATRICES, "steps", "zeros")), "step_stride", "zero_stride")


def _case(name: str, *, descent: bool, zeros: bool) -> Case:
    return Case(
        name=name,
        kernel=columns_kernel,
        types={
            **dict.fromkeys(_POINTERS, "*fp32"),
            **dict.fromkeys((*_STRIDES, "columns", "channels"), "i32"),
            **dict.fromkeys(("lowest", "highest"), "fp32"),
        },
        constants={"DESCENT": descent, "ZEROS": zeros, "COLUMNS": MOST_COLUMNS, "CHANNELS": CHANNELS},
        aligned=(*_POINTERS, *_STRIDES, "columns", "channels"),
        options={"num_warps": WARPS},
    )


CASES = [
    _case("columns/feed back", descent=False, zeros=False),
    _case("columns/feed back, zero points", descent=False, zeros=True),
    _case("columns/descend", descent=True, zeros=False),
]
