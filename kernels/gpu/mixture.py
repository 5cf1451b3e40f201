"""A sparse MLP's experts on Triton kernels: all experts of a projection in one launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu import layout
from counterweight.kernels.gpu import linear as single
from counterweight.kernels.gpu.activations import prepare
from counterweight.kernels.gpu.experts import Routing, align_tokens, block_of, expert_gemm, project_experts
from counterweight.kernels.gpu.hadamard import transform
from counterweight.kernels.gpu.layout import PackedWeight
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.linear import CompensatedLinear

__all__ = ["KernelExperts", "unsupported"]

Expert = Mapping[str, CompensatedLinear]
"""gate_proj, up_proj and down_proj of one expert."""

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def unsupported(experts: Sequence[Expert]) -> str | None:
    """Why these experts cannot run together; None when they can."""
    for projection in _PROJECTIONS:
        linears = [expert[projection] for expert in experts]
        for index, linear in enumerate(linears):
            where = f"expert {index}: {projection}: "
            if (reason := single.unsupported(linear)) is not None:
                return where + reason
            if linear.residual is not None:
                return f"{where}residual: expected none, its channels are chosen for one layer at a time"
            if _kind(linear) != _kind(linears[0]):
                return f"{where}{_kind(linear)}: expected {_kind(linears[0])}, as expert 0"
        branches = [branch for linear in linears if (branch := linear.low_rank()) is not None]
        if len({linear.bias is None for linear in linears}) > 1:
            return f"{projection}: some experts with a bias: expected all or none"
        dtypes = {str(branch.up.dtype) for branch in branches}
        if len(dtypes) > 1:
            return f"{projection}: factors of {' and '.join(sorted(dtypes))}: expected one dtype"
    return None


class KernelExperts(nn.Module):
    """hidden [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k] -> [tokens, hidden]: what transformers'
    modules of experts compute, for experts that are compensated linears.

    Every expert's layer means what `CompensatedLinear` says. Nothing is read back from the device, so a decoding step can be
    part of a CUDA graph.
    """

    def __init__(self, experts: Sequence[Expert], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        """product: (gate, up) -> the input of down_proj, elementwise. Raises ValueError with the reason of `unsupported`."""
        super().__init__()
        if (reason := unsupported(experts)) is not None:
            raise ValueError(reason)
        self.product = product
        self.experts = len(experts)
        self._gate, self._up, self._down = (
            _Projection.of([expert[name] for expert in experts]) for name in _PROJECTIONS
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.contiguous()
        block = block_of(top_k_index.numel(), self._gate.weight, dtype=x.dtype, device=x.device)
        routing = align_tokens(top_k_index, self.experts, block)
        gated = self.product(self._gate(x, routing), self._up(x, routing))
        inner = gated.flatten(0, 1).contiguous()  # [slots, intermediate]
        y = self._down(inner, routing, gates=top_k_weights.contiguous(), out_dtype=torch.float32)
        return y.sum(1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, bits={self._gate.weight.bits}, kernels=triton"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """One projection of all experts. up [experts, out, rank], down [experts, rank, in], step [experts, rank]: the branches,
    filled up with zeros to one rank; None without any. bias [experts, out]."""

    weight: PackedWeight
    activations: ActivationFormat | None
    transform: Hadamard | None
    up: Tensor | None
    down: Tensor | None
    step: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, linears: Sequence[CompensatedLinear]) -> _Projection:
        up, down, step = _stacked_factors(linears)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return cls(
            weight=layout.stack_weights([layout.prepare_weight(single.uniform_weight(linear)) for linear in linears]),
            activations=linears[0].activations,
            transform=linears[0].transform,
            up=up,
            down=down,
            step=step,
            bias=torch.stack(biases) if biases else None,
        )

    def __call__(
        self, x: Tensor, routing: Routing, *, gates: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [tokens or slots, in] -> [tokens, top_k, out]."""
        if self.transform is not None:
            x = transform(x, self.transform)
        prepared = prepare(x, self.weight, activations=self.activations)
        if self.down is not None:
            prepared = replace(prepared, projected=project_experts(x, self.down, routing, steps=self.step))
        return expert_gemm(prepared, self.weight, routing, up=self.up, bias=self.bias, gates=gates, out_dtype=out_dtype)


def _stacked_factors(linears: Sequence[CompensatedLinear]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    found = [single.factors(linear.low_rank()) for linear in linears]
    pairs = [(up, down) for up, down, _ in found if up is not None and down is not None]
    if not pairs:
        return None, None, None
    rank = max(down.shape[0] for _, down in pairs)
    first_up, first_down = pairs[0]
    ups = first_up.new_zeros(len(found), first_up.shape[0], rank)
    downs = first_down.new_zeros(len(found), rank, first_down.shape[1])
    steps = None if all(step is None for _, _, step in found) else ups.new_zeros(len(found), rank, dtype=torch.float32)
    for index, (up, down, step) in enumerate(found):
        if up is None or down is None:
            continue
        ups[index, :, : up.shape[1]] = up
        downs[index, : down.shape[0]] = down
        if steps is not None and step is not None:
            steps[index, : step.shape[0]] = step
    return ups, downs, steps


def _kind(linear: CompensatedLinear) -> str:
    weight = single.uniform_weight(linear)
    grid = "symmetric" if weight.zero_point is None else "asymmetric"
    return (
        f"{weight.bits} bits, group_size {weight.group_size}, {grid}, scales {weight.scale.dtype}, "
        f"{list(weight.codes.shape)}, activations {linear.activations}, transform {linear.transform}"
    )
