"""Local SGD: what each replica of a round is trained on, and how their states become one again.

An epoch's order of sequences is cut into rounds, and a round into a part for each replica. All begin a round with the same
state, take steps of their own, and are averaged (Stich 2018, arXiv 1805.09767). Adam's moments are averaged like the weights,
so that the next round's steps go on from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from counterweight.workers.methods.distillation import Distillation


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which sequences of a training these are. epoch: from 1. round, replica: from 0."""

    epoch: int
    round: int
    replica: int

    def sequences(self, count: int, options: Distillation) -> Tensor:
        """Indices of its sequences among `count`, int64, in the order in which they are trained on."""
        generator = torch.Generator().manual_seed((options.seed << 20) + self.epoch - 1)
        order = torch.randperm(count, generator=generator)
        return order.tensor_split(options.parts)[self.round * options.replicas + self.replica]

    def first_step(self, count: int, options: Distillation) -> int:
        """Steps that a replica has taken before: those of rounds, of which every replica takes its own."""
        return ((self.epoch - 1) * options.rounds + self.round) * options.steps(count)


@torch.no_grad()
def averaged(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of tensors of the same names, shapes and dtype: added in the order of `states`, each read when its turn comes,
    then divided. Of a single state its own bits. ValueError without one."""
    total: dict[str, Tensor] = {}
    count = 0
    for state in states:
        count += 1
        if count == 1:
            total = {name: tensor.clone() for name, tensor in state.items()}
        else:
            for name, tensor in total.items():
                tensor.add_(state[name])
        del state  # before the next is read
    if not count:
        raise ValueError("states: none: expected at least one to average")
    for tensor in total.values():
        tensor.div_(count)
    return total
