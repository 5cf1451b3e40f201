"""Checkpoints of 8-bit floats with a scale per block, as DeepSeek-V3 is published: which they are, and how they are decoded.

A weight W [out, in] is stored as codes F8_E4M3 [out, in] under its own name and float32 scales [ceil(out / rows),
ceil(in / columns)] under the name with `_scale_inv` behind it; W[i, j] = code[i, j] * scale[i // rows, j // columns]
(DeepSeek-V3, arXiv 2412.19437, section 3.3; config.json: quantization_config with quant_method fp8). Decoded, it is bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from counterweight.workers.checkpoint.dtypes import DTYPES, F8_E4M3, F32, StoredDtype
from counterweight.workers.checkpoint.encoding import EncodedWeight
from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.refusal import refusal, show

CODES = F8_E4M3
SCALE = "_scale_inv"

MAX_BLOCK = 1024
"""Rows or columns of a block; eight times as many as any published model has."""

_ANY = frozenset({"quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers", "dequantize"})
_KNOWN: Mapping[str, tuple[object, ...]] = {
    "fmt": (None, "e4m3"),
    "activation_scheme": (None, "dynamic"),  # how inputs are quantized when it is served, which decoding takes away
    "scale_fmt": (None, "ue8m0"),  # scales are powers of two, in float32 all the same
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaling:
    """Size of the blocks that share a scale."""

    rows: int
    columns: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BlockScaling | None:
        """What a config.json says of itself; None when it does not speak of fp8. CheckpointError for an fp8 checkpoint of
        another kind (a scale per tensor, quantized inputs), and for sizes out of bounds."""
        said: Any = config.get("quantization_config")
        if not isinstance(said, dict) or said.get("quant_method") != "fp8":
            return None
        problems = [
            f"{field}: {show(value)}, expected {' or '.join(map(repr, _KNOWN[field]))}"
            if field in _KNOWN
            else f"{field}: {show(value)}: unknown"
            for field, value in said.items()
            if field not in _ANY and value not in _KNOWN.get(field, ())
        ]
        size: object = said.get("weight_block_size")
        if not _is_block(size):
            problems.append(f"weight_block_size: {show(size)}, expected two whole numbers from 1 to {MAX_BLOCK}")
        if problems or not _is_block(size):
            raise refusal("quantization_config of fp8", problems)
        rows, columns = size
        return cls(rows=rows, columns=columns)

    @property
    def dtypes(self) -> Mapping[str, StoredDtype]:
        """See `Encoding.dtypes`."""
        return {**DTYPES, CODES.word: CODES}

    def weights(self, entries: Mapping[str, TensorEntry]) -> dict[str, EncodedWeight]:
        """See `Encoding.weights`: weights without scales and scales of another dtype or shape are refused."""
        found: dict[str, EncodedWeight] = {}
        problems: list[str] = []
        for name, entry in entries.items():
            if entry.dtype != CODES:
                continue
            where = f"{entry.file}: tensor {show(name)}"
            scale = entries.get(name + SCALE)
            if len(entry.shape) != 2:
                problems.append(f"{where}: F8_E4M3 of shape {list(entry.shape)}, expected a matrix")
            elif scale is None:
                problems.append(f"{where}: F8_E4M3 without scales, expected them as {show(name + SCALE)}")
            elif scale.dtype != F32 or scale.shape != self._grid(entry.shape):
                problems.append(
                    f"{scale.file}: tensor {show(scale.name)}: {scale.dtype} of shape {list(scale.shape)}, "
                    f"expected F32 of {list(self._grid(entry.shape))}"
                )
            else:
                found[name] = EncodedWeight.of(entry, scale, name, entry.shape)
        if problems:
            raise refusal("scales of blocks", problems)
        return found

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        out, width = shape
        return (-(-out // self.rows), -(-width // self.columns))


def _is_block(size: object) -> TypeGuard[list[int]]:
    # Not isinstance of each: JSON's true is an int to Python.
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= MAX_BLOCK for n in size)
