"""Checkpoints of 4-bit floats in blocks of 32 under a shared exponent (MXFP4), as gpt-oss is published.

OCP Microscaling Formats (MX) Specification 1.0, section 5: a code is E2M1 (sign, two bits of exponent, one of mantissa: 0, 0.5,
1, 1.5, 2, 3, 4, 6), a scale is E8M0, 2^(byte - 127), and the byte 255 no number. All experts' weights [experts, in, out] of a
projection are stored, transposed, as `<name>_blocks` U8 [experts, out, in / 32, 16], two codes a byte with the lower four bits
first, and `<name>_scales` U8 [experts, out, in / 32] (config.json: quantization_config with quant_method mxfp4). Products are
exact in bfloat16, to which they are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from counterweight.workers.checkpoint.dtypes import DTYPES, U8, StoredDtype
from counterweight.workers.checkpoint.encoding import EncodedWeight
from counterweight.workers.checkpoint.header import TensorEntry
from counterweight.workers.checkpoint.refusal import refusal, show

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
"""Weights that share a scale."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is the sign."""

_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The encoding has no parameters."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Mxfp4 | None:
        """What a config.json says of itself; None when it does not speak of MXFP4. CheckpointError for fields that nobody here
        knows."""
        said: Any = config.get("quantization_config")
        if not isinstance(said, dict) or said.get("quant_method") != "mxfp4":
            return None
        if unknown := [f"{field}: {show(value)}: unknown" for field, value in said.items() if field not in _KNOWN]:
            raise refusal("quantization_config of mxfp4", unknown)
        return cls()

    @property
    def dtypes(self) -> Mapping[str, StoredDtype]:
        """See `Encoding.dtypes`."""
        return DTYPES

    def weights(self, entries: Mapping[str, TensorEntry]) -> dict[str, EncodedWeight]:
        """See `Encoding.weights`."""
        found: dict[str, EncodedWeight] = {}
        problems: list[str] = []
        for codes in entries.values():
            name, where = codes.name.removesuffix(BLOCKS), f"{codes.file}: tensor {show(codes.name)}"
            if codes.dtype != U8 or name == codes.name:
                continue
            scales = entries.get(name + SCALES)
            if name in entries:
                problems.append(f"{where}: expected no {show(name)} beside it")
            elif len(codes.shape) != 4 or codes.shape[-1] != BLOCK // 2:
                problems.append(f"{where}: shape {list(codes.shape)}, expected [experts, out, in / 32, 16]")
            elif scales is None:
                problems.append(f"{where}: without scales, expected them as {show(name + SCALES)}")
            elif scales.dtype != U8 or scales.shape != codes.shape[:-1]:
                problems.append(
                    f"{scales.file}: tensor {show(scales.name)}: {scales.dtype} of shape {list(scales.shape)}, "
                    f"expected U8 of {list(codes.shape[:-1])}"
                )
            else:
                experts, out, groups, _ = codes.shape
                found[name] = EncodedWeight.of(codes, scales, name, (experts, groups * BLOCK, out))
        if problems:
            raise refusal("weights in MXFP4", problems)
        return found
