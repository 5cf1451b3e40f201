"""Gradients through a whole model with the graph of one block in memory at a time.

Checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) with a segment for each block: the forward
pass keeps what enters every block, the backward pass runs a block again before it goes through it. The gradients are those of
the plain backward pass, for a forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""A block: hidden states [batch, length, hidden] -> the same shape, with gradients."""


Objective = Callable[[Tensor], tuple[float, Tensor]]
"""The last block's output [batch, length, hidden] -> a value, and its derivative by the output, of the same shape."""


def accumulate(blocks: Sequence[Forward], objective: Objective, hidden: Tensor) -> float:
    """Adds to every parameter's `grad` its derivative of `objective` behind all blocks; the objective's value.

    hidden: [batch, length, hidden], what enters the first block.
    """
    entered: list[Tensor] = []
    with torch.no_grad():
        for block in blocks:
            entered.append(hidden)
            hidden = block(hidden)
    loss, gradient = objective(hidden)
    for block, states in zip(reversed(blocks), reversed(entered), strict=True):
        states = states.detach().requires_grad_()
        block(states).backward(gradient)
        assert states.grad is not None
        gradient = states.grad
    return loss
