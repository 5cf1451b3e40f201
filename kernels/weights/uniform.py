"""Integer codes on a uniform grid: compressed-tensors' `pack-quantized`, which stock transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from counterweight.kernels.forms import WeightForm
from counterweight.kernels.weights.packing import pack, packed_width, unpack
from counterweight.kernels.weights.stored_weight import (
    SCALE_DTYPES,
    StoredWeight,
    expect_finite,
    expect_names,
    expect_tensor,
    read_shape,
)

DECODED_TOKENS = 4
"""Tokens up to which codes are multiplied as they are on a CPU; beyond, one dense weight serves them all."""

_NAMES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class UniformWeight(StoredWeight):
    """Codes of a weight and the uniform grid they live on: (code - zero_point) * scale.

    codes: [out, in] int8, signed: -2**(bits-1) <= code <= 2**(bits-1) - 1, in compressed-tensors' convention.
    scale: [out, groups] in the dtype that the checkpoint stores; groups = ceil(in / group_size), or 1 per channel.
    zero_point: [out, groups] int8 in the range of the codes, or None for a symmetric grid.
    bits: 2, 3, 4 or 8. group_size: input columns that share a scale, or None for one scale per output channel.
    """

    kind: ClassVar[str] = "uniform"
    refusal: ClassVar[str | None] = None

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int | None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def form(self) -> WeightForm:
        return WeightForm(kind=self.kind, bits=self.bits, group_size=self.group_size, symmetric=self.zero_point is None)

    @property
    def code_bits(self) -> int:
        return self.codes.numel() * self.bits

    @property
    def scale_bits(self) -> int:
        zero_points = 0 if self.zero_point is None else self.zero_point.numel() * self.bits
        return 8 * self.scale.nbytes + zero_points

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scale, zero_point = self.scale.float(), self.zero_point
        columns = self.codes.shape[1]
        offset = self.codes.float()
        if self.group_size is None:
            centred = offset if zero_point is None else offset - zero_point.float()
            return (centred * scale).to(dtype)
        repeat = self.group_size
        if zero_point is not None:
            offset = offset - zero_point.float().repeat_interleave(repeat, dim=1)[:, :columns]
        return (offset * scale.repeat_interleave(repeat, dim=1)[:, :columns]).to(dtype)

    def rows(self, rows: slice) -> Self:
        return self.with_parts({name: tensor[rows].clone() for name, tensor in self.parts.items()})

    def columns(self, columns: slice) -> Self:
        start, stop, _ = columns.indices(self.codes.shape[1])
        size = self.group_size
        if size is None:
            parts = {name: tensor.clone() for name, tensor in self.parts.items() if name != "codes"}
            return self.with_parts({**parts, "codes": self.codes[:, start:stop].clone()})
        if start % size or (stop % size and stop != self.codes.shape[1]):
            raise ValueError(f"columns: {start} to {stop}: expected a whole number of groups of {size} columns")
        groups = slice(start // size, -(-stop // size))
        zero_point = None if self.zero_point is None else self.zero_point[:, groups].clone()
        return replace(
            self, codes=self.codes[:, start:stop].clone(), scale=self.scale[:, groups].clone(), zero_point=zero_point
        )

    def with_gains(self, gains: Tensor) -> Self:
        return replace(self, scale=(self.scale.float() * gains.float().unsqueeze(1)).to(self.scale.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """weight_packed int32 [out, words]; weight_scale [out, groups] in its own dtype; weight_shape int64 [2];
        weight_zero_point int32 [words, groups], packed along the output dimension, when the grid is asymmetric."""
        tensors = {
            "weight_packed": pack(self.codes, self.bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.zero_point is not None:
            tensors["weight_zero_point"] = pack(self.zero_point, self.bits, dim=0)
        return tensors

    @classmethod
    def names(cls, form: WeightForm) -> tuple[str, ...]:
        return _NAMES[:3] if form.symmetric else _NAMES

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], form: WeightForm) -> Self:
        bits, group_size = form.bits, form.group_size
        if bits not in _BITS:
            raise ValueError(f"bits: {bits}: expected 2, 3, 4 or 8")
        if group_size is not None and group_size <= 0:
            raise ValueError(f"group_size: {group_size}: expected a positive number of columns, or None")
        expect_names(tensors, cls.names(form))
        rows, columns = read_shape(tensors["weight_shape"])
        groups = 1 if group_size is None else -(-columns // group_size)
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        expect_tensor(packed, "weight_packed", (torch.int32,), (rows, packed_width(columns, bits)))
        expect_tensor(scale, "weight_scale", SCALE_DTYPES, (rows, groups))
        expect_finite(scale, "weight_scale")
        zero_point = None
        if not form.symmetric:
            words = tensors["weight_zero_point"]
            expect_tensor(words, "weight_zero_point", (torch.int32,), (packed_width(rows, bits), groups))
            zero_point = unpack(words, bits, rows, dim=0)
        codes = unpack(packed, bits, columns)
        return cls(codes=codes, scale=scale, zero_point=zero_point, bits=bits, group_size=group_size)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._multiplies_codes(x):
            return super().linear(x, bias)
        y = self._product_of_few(x)
        return y if bias is None else y + bias

    def _multiplies_codes(self, x: Tensor) -> bool:
        """Whether `_product_of_few` is the faster way, and possible: it has no gradient."""
        if torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad):
            return False
        columns = self.codes.shape[1]
        few = x.numel() <= DECODED_TOKENS * columns
        # torch's kernel reads codes in vectors; below 32 of them at a time it was seen to crash.
        group = self.group_size or columns
        whole = group % 32 == 0 and columns % group == 0
        return few and whole and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)

    @cached_property
    def _by_group(self) -> tuple[list[Tensor], list[Tensor]]:
        """Codes [out, group_size] and scales [out] of each group."""
        groups = 1 if self.group_size is None else self.codes.shape[1] // self.group_size
        codes = self.codes.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
        return list(codes.unbind(0)), list(self.scale.T.contiguous().unbind(0))

    def _product_of_few(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight's transpose, a few tokens on a CPU: torch multiplies codes as they are, group by group,
        and scales the sums, instead of a dense weight being made for every token."""
        codes_of, scales_of = self._by_group
        rows = x.reshape(-1, x.shape[-1])
        parts = rows.unflatten(1, (len(codes_of), -1))
        products = [
            torch.ops.aten._weight_int8pack_mm(part.contiguous(), codes, scale.to(x.dtype))
            for part, codes, scale in zip(parts.unbind(1), codes_of, scales_of, strict=True)
        ]
        total: Tensor = sum(products[1:], products[0])
        if self.zero_point is not None:
            # A zero point takes the same from every product of its group.
            shift = self.scale.float() * self.zero_point.float()
            total = total - (parts.float().sum(2) @ shift.T).to(x.dtype)
        return total.reshape(*x.shape[:-1], self.codes.shape[0])
