"""How much a block's task computes: what every step says of itself, put together. Torch-free.

Counted is what is run on a CPU. Left out is what grows with nothing but activations or groups of weights (norms, rotary
embeddings, scales of a group), what reading and writing costs, and the router. Where data decides (descent at a fixed point,
training without patience left, rank by energy), the most that it can be is counted; where a router decides, its share on
average. Statistics that a budget keeps in memory are counted once, even where there turns out to be no room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from counterweight.workers.arithmetic.forward import forward, statistics, tuning
from counterweight.workers.arithmetic.preparing import preparing
from counterweight.workers.arithmetic.solving import solving
from counterweight.workers.footprint import Load
from counterweight.workers.matrix_flops import Work

__all__ = ["Arithmetic", "arithmetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Operations of a block's tasks.

    prepare: rotated weights, and choices from the first shard's rows. forward: all passes through the block but those of
    training, in the dtype of the activations. statistics: products of the inputs. tune: training of codes. solve: codes,
    branches, stores and errors; and with a budget the gains that it is shared out by.
    """

    prepare: Work
    forward: Work
    statistics: Work
    tune: Work
    solve: Work


def arithmetic(load: Load) -> Arithmetic:
    """The arithmetic of a block's tasks."""
    return Arithmetic(
        prepare=preparing(load),
        forward=forward(load),
        statistics=statistics(load),
        tune=tuning(load),
        solve=solving(load),
    )
