"""Linears that run on weights which stay where, and as, they were read."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class LentLinear(nn.Linear):
    """A linear whose weight [out, in] is converted to the dtype and the device of its input each time that it runs, so that a
    block of many experts has one of them at a time in the form in which it computes. The bits are those of `nn.Linear` with the
    converted weight.

    bias: [out] as it runs, or None.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        # A part of a fused tensor may be a strided view, which the product would copy anew.
        return functional.linear(input, self.weight.to(input.device, input.dtype).contiguous(), self.bias)
