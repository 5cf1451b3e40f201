"""Layers of 8 and 70 billion parameters, in by out, with 8 or 16 channels of every 1024."""

from __future__ import annotations

from counterweight.kernels.forms import CHUNK
from counterweight.kernels.gate.case import ARCHS, Case
from counterweight.kernels.gpu.error_compensation import FETCHING_WARPS, add_rows_kernel, blocks, select_kernel
from counterweight.kernels.weights.packing import packed_width

_SELECT = {
    "x": "*bf16",
    "channels": "*i32",
    "x_stride": "i32",
    "in_features": "i32",
    "per_chunk": "i32",
    "chosen": "i32",
}
_ADD = {
    "y": "*fp32",
    "x": "*bf16",
    "channels": "*i32",
    "packed": "*i32",
    "scale": "*bf16",
    "y_stride": "i32",
    "x_stride": "i32",
    "channels_stride": "i32",
    "chosen": "i32",
    "words": "i32",
    "out_features": "i32",
}


def _select(name: str, largest: int, dtype: str, archs: tuple[int, ...] = ARCHS) -> Case:
    return Case(
        name=f"error_compensation/select {name}",
        kernel=select_kernel,
        types={**_SELECT, "x": f"*{dtype}"},
        constants={"CHUNK": 1024, "LARGEST": largest, "EXACT_KEYS": dtype == "fp32"},
        aligned=("x", "channels", "x_stride", "in_features"),
        options={"num_warps": 4},
        archs=archs,
    )


def _add(
    bits: int,
    in_features: int,
    out_features: int,
    *,
    per_chunk: int = 8,
    accumulate: bool = True,
    archs: tuple[int, ...] = ARCHS,
) -> Case:
    rows, words = blocks(per_chunk * in_features // CHUNK, packed_width(out_features, bits), bits)
    return Case(
        name=f"error_compensation/add int{bits} {in_features}x{out_features}{'' if accumulate else ' overwriting'}",
        kernel=add_rows_kernel,
        types=_ADD,
        constants={"BITS": bits, "ROWS": rows, "WORDS": words, "ACCUMULATE": accumulate},
        aligned=("y", "x", "channels", "packed", "scale", "y_stride", "x_stride", "words", "out_features"),
        options={"num_warps": FETCHING_WARPS},
        # A row is read over PCIe, where small requests waste the bus: 16 bytes, to be evicted first.
        required=dict.fromkeys(archs, ("LDG.EF.128",)),
        archs=archs,
    )


CASES = [
    _select("8 bf16", 8, "bf16"),
    _select("32 bf16", 32, "bf16", archs=(90,)),
    _select("128 fp32", 128, "fp32", archs=(80, 100)),
    _add(4, 4096, 4096),
    _add(4, 14336, 4096),
    _add(4, 8192, 57344),
    _add(4, 8192, 57344, accumulate=False, archs=(90,)),
    _add(2, 4096, 4096, archs=(80, 100)),
    _add(2, 8192, 57344, archs=(80, 100)),
    _add(8, 4096, 4096, per_chunk=16, archs=(80, 100)),
]
