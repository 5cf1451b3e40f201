"""A compensated linear layer: a stored weight, a low-rank branch on the unquantized input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.kernels.decoding import is_decoding
from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.residual import Correction
from counterweight.kernels.weights import StoredWeight


def compensated_product(
    inner: Tensor, x: Tensor, weight: StoredWeight, branch: LowRank | None, bias: Tensor | None = None
) -> Tensor:
    """inner W^T + (x D^T) U^T + b: what a compensated layer is but for its residual. inner: x as the codes are given it,
    quantized or not; both [..., in]. bias: [out], of x's dtype. Returns [..., out]."""
    y = weight.linear(inner, bias)
    if branch is None:
        return y
    up, down = branch.factors(x.dtype)
    return y + functional.linear(functional.linear(x, down), up)


class CompensatedLinear(nn.Module):
    """y = Q(x) W^T + (x D^T) U^T + b, with W from its stored form, Q the activation quantizer (identity when weight-only)
    and U D the low-rank branch, which always sees the unquantized x. With a `transform`, x is the transformed input
    everywhere. A `residual` adds what its store holds for the channels of x that matter most: to every token, or with
    `decode_only` to those that come one at a time (`kernels.decoding`). Takes the place of a `torch.nn.Linear`.

    x: [..., in] of any float dtype; y: [..., out] of the same dtype. The weight's tensors are buffers under their own names.
    """

    up: Tensor | None
    down: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: StoredWeight,
        *,
        low_rank: LowRank | None = None,
        bias: Tensor | None = None,
        activations: ActivationFormat | None = None,
        transform: Hadamard | None = None,
        residual: Correction | None = None,
        decode_only: bool = False,
    ) -> None:
        super().__init__()
        self.activations, self.transform, self.residual = activations, transform, residual
        self.decode_only = decode_only
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        if taken := weight.parts.keys() & {"up", "down", "up_scale", "down_scale", "bias"}:
            raise ValueError(f"weight: {weight.kind}: parts {sorted(taken)}: expected other names than the branch's")
        for name, part in weight.parts.items():
            self.register_buffer(name, part)
        self._code_bits: Literal[4, 8] = 8 if low_rank is None else low_rank.code_bits
        self.register_buffer("up", None if low_rank is None else low_rank.up)
        self.register_buffer("down", None if low_rank is None else low_rank.down)
        self.register_buffer("up_scale", None if low_rank is None else low_rank.up_scale)
        self.register_buffer("down_scale", None if low_rank is None else low_rank.down_scale)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> StoredWeight:
        """The weight, made of the tensors that are the layer's buffers now."""
        if any(self.get_buffer(name) is not part for name, part in self._weight.parts.items()):
            self._weight = self._weight.with_parts({name: self.get_buffer(name) for name in self._weight.parts})
        return self._weight

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.weight.device

    def low_rank(self) -> LowRank | None:
        """The low-rank branch, as a value."""
        if self.up is None or self.down is None:
            return None
        return LowRank(
            up=self.up,
            down=self.down,
            up_scale=self.up_scale,
            down_scale=self.down_scale,
            code_bits=self._code_bits,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = self.transform.apply(x)
        inner = x if self.activations is None else fake_quantize_activations(x, self.activations)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = compensated_product(inner, x, self.weight, self.low_rank(), bias)
        if self.residual is not None and (not self.decode_only or is_decoding(x)):
            y = y + self.residual.apply(x).to(x.dtype)
        return y

    def extra_repr(self) -> str:
        rank = 0 if self.down is None else self.down.shape[0]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight={self._weight.form}, "
            f"activations={self.activations}, rank={rank}"
        )
