"""Blocks of `MOST_COLUMNS` columns, as wide as they come."""

from __future__ import annotations

from typing import Any

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gpu.columns import CHANNELS, MOST_COLUMNS, WARPS, descend_kernel, feed_back_kernel


def _case(name: str, kernel: Any, matrices: tuple[str, ...], *, zeros: bool) -> Case:
    strides = [f"{matrix}_stride" for matrix in matrices] + [
        "steps_stride",
        "step_stride",
        "zeros_stride",
        "zero_stride",
    ]
    pointers = [*matrices, "feed" if kernel is feed_back_kernel else "pull", "steps", "zeros"]
    return Case(
        name=name,
        kernel=kernel,
        types={
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(strides, "i32"),
            "columns": "i32",
            "channels": "i32",
            "lowest": "fp32",
            "highest": "fp32",
        },
        constants={"ZEROS": zeros, "COLUMNS": MOST_COLUMNS, "CHANNELS": CHANNELS},
        aligned=(*pointers, *strides, "columns", "channels"),
        options={"num_warps": WARPS},
    )


CASES = [
    _case("columns/feed back", feed_back_kernel, ("codes", "error", "target", "aim"), zeros=False),
    _case("columns/feed back, zero points", feed_back_kernel, ("codes", "error", "target", "aim"), zeros=True),
    _case("columns/descend", descend_kernel, ("codes", "error", "before", "slope"), zeros=False),
]
