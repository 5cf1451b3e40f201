"""A sparse MLP's experts as separate linears, drop-ins for transformers' modules that fuse them into 3-D parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from counterweight.workers.models.at_once import AtOnce, Watch
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

    def _parts(self, experts: Tensor) -> list[tuple[int, int, int]]:
        """Of `experts`, sorted: those that are run and are in it, each with where it begins and where it ends. Asked of the
        device once, which would be waited for as often as it is asked."""
        bounds = torch.arange(self.experts + 1, device=experts.device)
        starts = torch.searchsorted(experts, bounds).tolist()
        parts = ((expert, starts[expert], starts[expert + 1]) for expert in self.running())
        return [part for part in parts if part[1] < part[2]]

    @abstractmethod
    def tokens(self, *arguments: Tensor) -> Tensor:
        """What experts are given in a call with these `arguments`, [tokens, hidden]: each token once for a call that says which
        experts see it, otherwise once for each expert that does, as that is given it."""


class LinearExperts(SeparateExperts):
    """Experts that are given the routing.

    Called as transformers calls its own: hidden [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k].
    An expert without tokens is not run.
    """

    _watched: tuple[AtOnce, Watch] | None = None

    def at_once(self, rows: int, dtype: torch.dtype, device: torch.device) -> AtOnce | None:
        """How all experts run together on so many rows in all; None where they do not."""
        # Looked up where they are needed: each shard asks, and on a CPU the answer is always no.
        linears = ([self.get_submodule(f"{expert}.{name}") for expert in range(self.experts)] for name in PROJECTIONS)
        return AtOnce.of(linears, self.product, rows / self.experts, dtype, device)

    @contextmanager
    def watched(self, together: AtOnce, watch: Watch) -> Iterator[None]:
        """While it is open, experts run together, and `watch` sees what enters them."""
        self._watched = together, watch
        try:
            yield
        finally:
            self._watched = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        together, watch = self._watched or (
            self.at_once(top_k_index.numel(), hidden_states.dtype, hidden_states.device),
            None,
        )
        if together is not None:
            return together(hidden_states, top_k_index, top_k_weights, frozenset(self.running()), watch)
        output = torch.zeros_like(hidden_states)
        of_slot, slots = top_k_index.flatten().sort(stable=True)  # an expert's in the order of the tokens
        tokens, weights = slots // top_k_index.shape[1], top_k_weights.flatten()[slots, None]
        for expert, first, end in self._parts(of_slot):
            token = tokens[first:end]
            weighted = self.run(expert, hidden_states[token]) * weights[first:end]
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
        output = torch.zeros_like(hidden_states)
        (rows,) = torch.where(hidden_states.any(-1))
        for expert, first, end in self._parts(rows // (len(hidden_states) // self.experts)):
            row = rows[first:end]
            output[row] = self.run(expert, hidden_states[row]).to(output.dtype)
        return output

    def tokens(self, *arguments: Tensor) -> Tensor:
        (hidden_states,) = arguments
        return hidden_states[hidden_states.any(-1)]
