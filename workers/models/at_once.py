"""Experts that see few tokens each, all in one launch a projection: on a GPU each of them would take the host longer to start
than the device to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from counterweight.kernels.backend import runs_kernels
from counterweight.workers.models.family import PROJECTIONS, Product
from counterweight.workers.models.lent import LentLinear
from counterweight.workers.parallel import FEW_TOKENS

if TYPE_CHECKING:
    from counterweight.kernels.gpu.grouped import Places

Watch = Callable[[str, Tensor, Tensor], None]
"""Called with a projection, what enters it of all experts [rows, in], sorted by expert, and where each expert's begin: int64
[experts + 1], on the device; rows behind the last are nobody's."""


@dataclass(frozen=True, slots=True)
class AtOnce:
    """The weights of all experts' projections, where they lie. product: what an expert computes between its linears."""

    weights: dict[str, Places]
    product: Product

    @classmethod
    def of(
        cls,
        linears: Iterable[Sequence[nn.Module]],
        product: Product,
        tokens: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AtOnce | None:
        """None where they have to run one by one: not on a GPU, trained, hooked, with biases, in another dtype than what enters
        them, or with many tokens each, of which a library's product makes more of the device. linears: of each of
        `PROJECTIONS`, of each expert. tokens: that one is given on average."""
        if tokens >= FEW_TOKENS or dtype.itemsize != 2 or not runs_kernels(device) or torch.is_grad_enabled():
            return None
        from counterweight.kernels.gpu.grouped import Places

        weights: dict[str, Places] = {}
        for name, alike in zip(PROJECTIONS, linears, strict=True):
            if not all(_plain(linear, dtype) for linear in alike):
                return None
            places = Places.of([linear.weight for linear in alike])  # type: ignore[misc]
            if places is None or places.first.device != device or places.first.stride(1) != 1:
                return None
            weights[name] = places
        return cls(weights, product)

    def __call__(
        self, hidden: Tensor, index: Tensor, weights: Tensor, experts: frozenset[int], watch: Watch | None
    ) -> Tensor:
        """What `LinearExperts` computes, to the same order of sums. hidden [tokens, hidden]; index, weights [tokens, k].
        experts: those that are run."""
        from counterweight.kernels.gpu.grouped import grouped_linear

        (tokens, count), every = index.shape, len(self.weights[PROJECTIONS[0]].elements)
        chosen = index.flatten()
        if len(experts) < every:
            run = torch.tensor([expert in experts for expert in range(every)], device=index.device)
            chosen = torch.where(run[chosen], chosen, every)
        of_row, rows = chosen.sort(stable=True)
        bounds = torch.searchsorted(of_row, torch.arange(every + 1, device=index.device))

        def linear(name: str, x: Tensor) -> Tensor:
            return grouped_linear(x, bounds, self.weights[name])

        gate, up, down = PROJECTIONS
        entering = hidden[rows // count]
        if watch is not None:
            watch(gate, entering, bounds)
        inner = self.product(linear(gate, entering), linear(up, entering))
        del entering
        if watch is not None:
            watch(down, inner, bounds)
        made = (linear(down, inner) * weights.flatten()[rows, None]).to(hidden.dtype)
        place = torch.empty_like(rows)
        place[rows] = torch.arange(len(rows), device=rows.device)
        output = torch.zeros_like(hidden)
        for of_token in place.view(tokens, count).sort(dim=1).values.T:  # in the order of the experts
            output += made[of_token]
        return output


def _plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether this is a product with a weight of that dtype and nothing else."""
    if type(linear) not in (nn.Linear, LentLinear):
        return False
    return not linear._forward_pre_hooks and linear.weight.dtype is dtype and linear.bias is None
