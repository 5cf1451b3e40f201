"""A compensated linear layer on Triton kernels: takes the place of a `kernels.linear.CompensatedLinear` and means the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from counterweight.kernels.decoding import is_decoding
from counterweight.kernels.formats import LowRank
from counterweight.kernels.gpu import activations, integer_gemm, layout
from counterweight.kernels.gpu.error_compensation import MOST_PER_CHUNK, add_rows_, select_channels
from counterweight.kernels.gpu.hadamard import transform
from counterweight.kernels.gpu.host_memory import HostArena
from counterweight.kernels.gpu.weight_gemm import weight_gemm
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.residual import Correction
from counterweight.kernels.weights.uniform import UniformWeight

__all__ = ["KernelLinear", "unsupported"]


def unsupported(linear: CompensatedLinear) -> str | None:
    """Why no kernel can take this layer's place; None when one can."""
    weight = linear.weight
    if not isinstance(weight, UniformWeight):
        return f"weight: {weight.kind}: expected {UniformWeight.kind}, which kernels multiply"
    return layout.unsupported(weight) or activations.unsupported(linear.activations)


def uniform_weight(linear: CompensatedLinear) -> UniformWeight:
    """The weight of a layer that a kernel can multiply; ValueError with the reason of `unsupported` for another."""
    weight = linear.weight
    if (reason := unsupported(linear)) is not None or not isinstance(weight, UniformWeight):
        raise ValueError(reason)
    return weight


class KernelLinear(nn.Module):
    """x [..., in] float16, bfloat16 or float32 -> y [..., out] of the same dtype, as `CompensatedLinear` says.

    Sums are float32 where the torch layer rounds products of weight, branch and residual to x's dtype one by one. Up to
    `DECODE_TOKENS` tokens run on the decoding kernel; beyond, a quantized input is multiplied on integer tensor cores where
    the weight's shape allows it. The residual's rows lie in `arena` and are read from there, or without one beside the layer.
    """

    def __init__(self, linear: CompensatedLinear, arena: HostArena | None = None) -> None:
        """Raises ValueError with the reason of `unsupported`."""
        super().__init__()
        weight = uniform_weight(linear)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.activations, self.transform = linear.activations, linear.transform
        self.weight = layout.prepare_weight(weight)
        integer = linear.activations is not None and integer_gemm.unsupported(weight) is None
        self.integer_weight = integer_gemm.prepare_integer(weight) if integer else None
        self.up, self.down, self.step = factors(linear.low_rank())
        self.bias = linear.bias
        self.decode_only = linear.decode_only
        self.residual = None if linear.residual is None else _placed(linear.residual, arena, weight.scale.device)
        self._arena = arena  # which ends when nobody holds it
        self._static: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        if self.transform is not None:
            rows = transform(rows, self.transform)
        corrected = self.residual is not None and (not self.decode_only or is_decoding(x))
        y = self._product(rows, torch.float32 if corrected else x.dtype)
        if corrected and self.residual is not None:
            y = add_rows_(y, rows, self.residual.store, self._channels(rows, self.residual)).to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor, out_dtype: torch.dtype) -> Tensor:
        many = rows.shape[0] > layout.DECODE_TOKENS
        weight = self.integer_weight if many and self.integer_weight is not None else self.weight
        x = activations.prepare(rows, weight, activations=self.activations, down=self.down, step=self.step)
        if isinstance(weight, layout.PackedWeight):
            return weight_gemm(x, weight, up=self.up, bias=self.bias, out_dtype=out_dtype)
        return integer_gemm.integer_gemm(x, weight, up=self.up, bias=self.bias, out_dtype=out_dtype)

    def _channels(self, rows: Tensor, correction: Correction) -> Tensor:
        """The channels that `correction` selects, [tokens, chosen], or [chosen] when they are always the same."""
        if correction.selection == "chunked" and correction.channels_per_chunk <= MOST_PER_CHUNK:
            return select_channels(rows, correction.channels_per_chunk)
        if correction.selection == "static":
            if self._static is None:
                self._static = correction.select(rows).nonzero().squeeze(1)
            return self._static
        # A choice that no kernel makes; as many channels for every token, so that sizes follow from shapes.
        return correction.select(rows).byte().topk(correction.channels, dim=-1).indices

    def extra_repr(self) -> str:
        rank = 0 if self.down is None else self.down.shape[0]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.weight.bits}, "
            f"groups={self.weight.groups}, activations={self.activations}, rank={rank}, kernels=triton"
        )


def factors(branch: LowRank | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """up, down and the step of both, as kernels take them: None without a branch, no step for factors that are not codes."""
    if branch is None:
        return None, None, None
    step = None
    if branch.up_scale is not None and branch.down_scale is not None:
        step = (branch.up_scale * branch.down_scale).float()
    return branch.up.contiguous(), branch.down.contiguous(), step


def _placed(correction: Correction, arena: HostArena | None, device: torch.device) -> Correction:
    """The correction on the device, but for its rows if there is an arena for them."""
    moved = correction.to(device)
    if arena is None:
        return moved
    return replace(moved, store=replace(moved.store, packed=arena.place(correction.store.packed)))
