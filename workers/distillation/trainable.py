"""A compressed linear in training, and a block of such linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.kernels.formats import LowRank
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.block import CompressedLinear
from counterweight.workers.compensation.regression import stored
from counterweight.workers.models.block_builder import Block
from counterweight.workers.tuning.fake_quant import straight_through


class TrainableLinear(nn.Module):
    """Computes what `CompensatedLinear` computes, with the factors of its branch and gains of its scales as parameters.

    x: [..., in], y: [..., out], of one float dtype. up [out, rank], down [rank, in]: the branch, in the dtype of training; None
    without one. gain [out]: by what the scales of each output channel are multiplied, ones at first. Codes are fixed. Rounding
    of the input has the gradient of the identity (straight-through, Bengio et al. 2013).
    """

    up: nn.Parameter | None
    down: nn.Parameter | None
    bias: Tensor | None

    def __init__(self, linear: CompressedLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._first = linear
        self._weight = linear.weight
        self.gain = nn.Parameter(torch.ones(linear.weight.shape[0], dtype=dtype, device=linear.weight.device))
        self.up = self.down = None
        self.register_buffer("bias", None if bias is None else bias.detach())
        if linear.low_rank is not None:
            up, down = linear.low_rank.factors(dtype)
            self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        first = self._first
        if first.transform is not None:
            x = first.transform.apply(x)
        inner = x
        if first.activations is not None:
            inner = straight_through(x, fake_quantize_activations(x.detach(), first.activations))
        y = self._weight.linear(inner) * self.gain
        if self.bias is not None:
            y = y + self.bias
        if self.up is not None and self.down is not None:
            y = y + functional.linear(functional.linear(x, self.down), self.up)
        return y

    def stored(self) -> CompressedLinear:
        """The linear as it would be stored: scales and factors in the dtypes, or the integer codes, that they began in."""
        return replace(self._first, weight=self._first.weight.with_gains(self.gain.detach()), low_rank=self._branch())

    @torch.no_grad()
    def round(self) -> None:
        """Computes from now on with what is read back of `stored`, which takes the gains in."""
        found = self.stored()
        self._weight = found.weight
        self.gain.fill_(1)
        if found.low_rank is not None and self.up is not None and self.down is not None:
            up, down = found.low_rank.factors(self.up.dtype)
            self.up.copy_(up)
            self.down.copy_(down)

    def unround(self) -> None:
        """Back to the scales that the linear began with, for gains to multiply."""
        self._weight = self._first.weight

    def _branch(self) -> LowRank | None:
        first = self._first.low_rank
        if first is None or self.up is None or self.down is None:
            return None
        if not self.up.requires_grad:
            return first
        up, down = self.up.detach(), self.down.detach()
        if first.up_scale is not None:
            return stored(LowRank(up=up, down=down), first.code_bits)
        return LowRank(up=up.to(first.up.dtype).contiguous(), down=down.to(first.down.dtype).contiguous())


def make_trainable(
    block: Block, linears: Mapping[str, CompressedLinear], dtype: torch.dtype
) -> tuple[dict[str, TrainableLinear], dict[str, nn.Parameter]]:
    """Replaces the block's linears by trainable ones of `dtype`; these by name, and the weights of the block's norms likewise.

    Of all other parameters no gradient is taken.
    """
    made: dict[str, TrainableLinear] = {}
    for name, linear in linears.items():
        made[name] = TrainableLinear(linear, getattr(block.layer.get_submodule(name), "bias", None), dtype)
        block.replace(name, made[name])
    norms: dict[str, nn.Parameter] = {}
    for name, parameter in block.layer.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in made:
            continue
        is_norm = name.endswith("norm.weight")
        parameter.requires_grad_(is_norm)
        if is_norm:
            norms[name] = parameter
    return made, norms
