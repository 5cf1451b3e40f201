"""Signs and two vectors: W ~ diag(row_scale) sign(W) diag(column_scale).

OneBit (Xu et al. 2024, "OneBit: Towards Extremely Low-bit Large Language Models", section 3.2), without its training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.forms import WeightForm
from counterweight.kernels.weights.stored_weight import (
    SCALE_DTYPES,
    StoredWeight,
    expect_finite,
    expect_names,
    expect_tensor,
    read_shape,
)

_NAMES = ("weight_signs", "weight_row_scale", "weight_column_scale", "weight_shape")


@dataclass(frozen=True, kw_only=True)
class SignWeight(StoredWeight):
    """words: [out, ceil(in / 32)] int32; bit j of word i of a row is 1 where column 32 i + j is not negative, unused bits are
    0. row_scale [out], column_scale [in]: in the dtype that the checkpoint stores."""

    kind: ClassVar[str] = "sign"
    refusal: ClassVar[str | None] = "weights of signs and two vectors: compressed-tensors has no such format"

    words: Tensor
    row_scale: Tensor
    column_scale: Tensor

    @classmethod
    def of(cls, signs: Tensor, row_scale: Tensor, column_scale: Tensor) -> Self:
        """signs: [out, in], of which a number that is not negative counts as 1."""
        bits = functional.pad(signs >= 0, (0, -signs.shape[1] % 32)).unflatten(1, (-1, 32))
        words = (bits.to(torch.int64) << torch.arange(32, device=signs.device)).sum(2)
        # 2**31 and more are negative in int32.
        return cls(words=words.to(torch.int32), row_scale=row_scale, column_scale=column_scale)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row_scale), len(self.column_scale)

    @property
    def form(self) -> WeightForm:
        return WeightForm(kind=self.kind, bits=1)

    @property
    def code_bits(self) -> int:
        return 8 * self.words.nbytes

    @property
    def scale_bits(self) -> int:
        return 8 * (self.row_scale.nbytes + self.column_scale.nbytes)

    def signs(self, dtype: torch.dtype) -> Tensor:
        """[out, in], 1 and -1."""
        bits = (self.words.unsqueeze(2) >> torch.arange(32, device=self.words.device, dtype=torch.int32)) & 1
        return (bits.flatten(1)[:, : len(self.column_scale)] * 2 - 1).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scaled = self.signs(torch.float32) * self.row_scale.float().unsqueeze(1) * self.column_scale.float()
        return scaled.to(dtype)

    def dense_factor(self, dtype: torch.dtype) -> Tensor:
        return self.signs(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # Sums of signs in x's dtype: no dense weight is rounded to it.
        y = functional.linear(x * self.column_scale.to(x.dtype), self._factor(x.dtype)) * self.row_scale.to(x.dtype)
        return y if bias is None else y + bias

    def rows(self, rows: slice) -> Self:
        return type(self)(
            words=self.words[rows].clone(),
            row_scale=self.row_scale[rows].clone(),
            column_scale=self.column_scale.clone(),
        )

    def columns(self, columns: slice) -> Self:
        return self.of(self.signs(torch.int8)[:, columns], self.row_scale.clone(), self.column_scale[columns].clone())

    def with_gains(self, gains: Tensor) -> Self:
        return replace(self, row_scale=(self.row_scale.float() * gains.float()).to(self.row_scale.dtype))

    def tensors(self) -> dict[str, Tensor]:
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return dict(zip(_NAMES, (self.words, self.row_scale, self.column_scale, shape), strict=True))

    @classmethod
    def names(cls, form: WeightForm) -> tuple[str, ...]:
        return _NAMES

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], form: WeightForm) -> Self:
        if form != WeightForm(kind=cls.kind, bits=1):
            raise ValueError(f"format: {form}: expected 1 bit, no groups, symmetric")
        expect_names(tensors, _NAMES)
        rows, columns = read_shape(tensors["weight_shape"])
        expect_tensor(tensors["weight_signs"], "weight_signs", (torch.int32,), (rows, -(-columns // 32)))
        for name, size in (("weight_row_scale", rows), ("weight_column_scale", columns)):
            expect_tensor(tensors[name], name, SCALE_DTYPES, (size,))
            expect_finite(tensors[name], name)
        words, row_scale, column_scale = (tensors[name] for name in _NAMES[:3])
        return cls(words=words, row_scale=row_scale, column_scale=column_scale)
