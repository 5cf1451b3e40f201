"""A sparse MLP's experts as separate linears, drop-ins for transformers' modules that fuse them into 3-D parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from counterweight.workers.models.family import PROJECTIONS, Product


@dataclass(frozen=True, slots=True)
class GatedProduct:
    """activation(gate) * up, the product of most families' experts."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


class SeparateExperts(nn.Module):
    """Experts `0`, `1`, ... with one linear per projection. product: what an expert computes between its linears. asked:
    experts that are run; None: all."""

    def __init__(self, experts: int, hidden: int, intermediate: int, product: Product, *, bias: bool = False) -> None:
        super().__init__()
        self.product = product
        self.asked: frozenset[int] | None = None
        for expert in range(experts):
            self.add_module(
                str(expert),
                nn.ModuleDict(
                    {
                        "gate_proj": nn.Linear(hidden, intermediate, bias=bias),
                        "up_proj": nn.Linear(hidden, intermediate, bias=bias),
                        "down_proj": nn.Linear(intermediate, hidden, bias=bias),
                    }
                ),
            )
        self.experts, self.hidden = experts, hidden

    def running(self) -> list[int]:
        """The experts that are run, in order."""
        return [expert for expert in range(self.experts) if self.asked is None or expert in self.asked]

    def run(self, expert: int, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> what this expert makes of it, same shape."""
        gate, up, down = (self.get_submodule(f"{expert}.{name}") for name in PROJECTIONS)
        output: Tensor = down(self.product(gate(x), up(x)))
        return output

    @abstractmethod
    def tokens(self, *arguments: Tensor) -> Tensor:
        """What experts are given in a call with these `arguments`, [tokens, hidden]: each token once for a call that says which
        experts see it, otherwise once for each expert that does, as that is given it."""


class LinearExperts(SeparateExperts):
    """Experts that are given the routing.

    Called as transformers calls its own: hidden [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k].
    An expert without tokens is not run.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in self.running():
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            weighted = self.run(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output

    def tokens(self, *arguments: Tensor) -> Tensor:
        return arguments[0]


class SortedExperts(SeparateExperts):
    """Experts that are given their inputs, scaled by the router.

    Called as transformers calls its own: hidden [experts * tokens, hidden], all tokens for expert 0, then for expert 1, ...;
    a token that an expert does not see is a row of zeros, of which experts without biases make zeros: it is not run.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.unflatten(0, (self.experts, -1))
        output = torch.zeros_like(rows)
        for expert in self.running():
            (token,) = torch.where(rows[expert].any(-1))
            if token.numel() > 0:
                output[expert, token] = self.run(expert, rows[expert, token]).to(output.dtype)
        return output.flatten(0, 1)

    def tokens(self, *arguments: Tensor) -> Tensor:
        (hidden_states,) = arguments
        return hidden_states[hidden_states.any(-1)]
