"""A compensated linear layer: integer weight, low-rank branch on the unquantized input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from kernels.formats import ActivationFormat, LowRank, QuantizedWeight
from kernels.hadamard import Hadamard
from kernels.reference import fake_quantize_activations
from kernels.residual import Correction


class CompensatedLinear(nn.Module):
    """y = Q(x) W^T + (x D^T) U^T + b, with W from integer codes, Q the activation quantizer (identity when weight-only)
    and U D the low-rank branch, which always sees the unquantized x. With a `transform`, x is the transformed input
    everywhere. A `residual` adds what its store holds for the channels of x that matter most: to every token, or with
    `decode_only` to those that come one at a time, as they do while a text is generated. Takes the place of a
    `torch.nn.Linear`.

    x: [..., in] of any float dtype; y: [..., out] of the same dtype. The weight is dequantized in float32 and cast.
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
        y = functional.linear(inner, self.quantized().dequantize(x.dtype), bias)
        branch = self.low_rank()
        if branch is not None:
            up, down = branch.factors(x.dtype)
            y = y + functional.linear(functional.linear(x, down), up)
        if self.residual is not None and (not self.decode_only or x.shape[-2] == 1):
            y = y + self.residual.apply(x).to(x.dtype)
        return y

    def extra_repr(self) -> str:
        rank = 0 if self.down is None else self.down.shape[0]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, activations={self.activations}, rank={rank}"
        )
