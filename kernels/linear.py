"""A compensated linear layer: integer weight, low-rank branch on the unquantized input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.kernels.formats import ActivationFormat, LowRank, QuantizedWeight
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.residual import Correction

DECODED_TOKENS = 4
"""Tokens up to which a layer on a CPU multiplies codes as they are; beyond, one dense weight serves them all."""


class CompensatedLinear(nn.Module):
    """y = Q(x) W^T + (x D^T) U^T + b, with W from integer codes, Q the activation quantizer (identity when weight-only)
    and U D the low-rank branch, which always sees the unquantized x. With a `transform`, x is the transformed input
    everywhere. A `residual` adds what its store holds for the channels of x that matter most: to every token, or with
    `decode_only` to those that come one at a time, as they do while a text is generated. Takes the place of a
    `torch.nn.Linear`.

    x: [..., in] of any float dtype; y: [..., out] of the same dtype. The weight is dequantized in float32 and
    cast; for the few tokens of a decoding step on a CPU, its codes are multiplied as they are.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    up: Tensor | None
    down: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        *,
        low_rank: LowRank | None = None,
        bias: Tensor | None = None,
        activations: ActivationFormat | None = None,
        transform: Hadamard | None = None,
        residual: Correction | None = None,
        decode_only: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self.activations, self.transform, self.residual = activations, transform, residual
        self.decode_only = decode_only
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("up", None if low_rank is None else low_rank.up)
        self.register_buffer("down", None if low_rank is None else low_rank.down)
        self.register_buffer("up_scale", None if low_rank is None else low_rank.up_scale)
        self.register_buffer("down_scale", None if low_rank is None else low_rank.down_scale)
        self.register_buffer("bias", bias)
        self._by_group: tuple[list[Tensor], list[Tensor]] | None = None

    def quantized(self) -> QuantizedWeight:
        """The integer weight, as a value."""
        return QuantizedWeight(
            codes=self.codes,
            scale=self.scale,
            zero_point=self.zero_point,
            bits=self.bits,
            group_size=self.group_size,
        )

    def low_rank(self) -> LowRank | None:
        """The low-rank branch, as a value."""
        if self.up is None or self.down is None:
            return None
        return LowRank(up=self.up, down=self.down, up_scale=self.up_scale, down_scale=self.down_scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = self.transform.apply(x)
        inner = x if self.activations is None else fake_quantize_activations(x, self.activations)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._decodes(inner):
            y = self._product_of_few(inner)
            y = y if bias is None else y + bias
        else:
            y = functional.linear(inner, self.quantized().dequantize(x.dtype), bias)
        branch = self.low_rank()
        if branch is not None:
            up, down = branch.factors(x.dtype)
            y = y + functional.linear(functional.linear(x, down), up)
        if self.residual is not None and (not self.decode_only or x.shape[-2] == 1):
            y = y + self.residual.apply(x).to(x.dtype)
        return y

    def _decodes(self, x: Tensor) -> bool:
        """Whether `_product_of_few` is the faster way, and possible."""
        few = x.numel() <= DECODED_TOKENS * self.in_features
        # torch's kernel reads codes in vectors; below 32 of them at a time it was seen to crash.
        whole = (self.group_size or self.in_features) % 32 == 0
        return few and whole and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)

    def _product_of_few(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight's transpose, a few tokens on a CPU: torch multiplies codes as they are, group by group,
        and scales the sums, instead of a dense weight being made for every token."""
        if self._by_group is None:
            groups = 1 if self.group_size is None else self.in_features // self.group_size
            codes = self.codes.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
            self._by_group = list(codes.unbind(0)), list(self.scale.T.contiguous().unbind(0))
        codes_of, scales_of = self._by_group
        rows = x.reshape(-1, self.in_features)
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
        return total.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        rank = 0 if self.down is None else self.down.shape[0]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, activations={self.activations}, rank={rank}"
        )
