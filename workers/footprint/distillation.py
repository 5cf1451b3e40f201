"""Memory and traffic of training a compressed model as a whole, in float32. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from counterweight.workers.footprint.load import Group, Load
from counterweight.workers.matrix_bytes import SINGLE
from counterweight.workers.methods.distillation import Distillation

RUNNING = 4
"""Tensors of a state for each that is trained: its value, the average of that, two moments. Behind an epoch there is one more,
the value that is kept."""

STEPPED = 11
"""Copies of what is trained while steps are taken: itself, its gradient, where it began, and the state before and now."""

GATHERED = 15
"""Likewise at the end of an epoch, while replicas are averaged: itself, where it began, what is kept, the mean, and the state
that is read, as bytes and as tensors."""

LOGITS = 6
"""Copies of one sequence's logits: of both models, their log-probabilities, their difference and its gradient."""

EMBEDDINGS = 3
"""Matrices of vocabulary and hidden size: the embedding, the head and the original's head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Sequences of `length` tokens that are trained on, and held out."""

    trained: int
    held_out: int
    length: int


def trained_parameters(load: Load, options: Distillation) -> int:
    """Numbers of a block that are trained; of norms there are about two of the stream's width."""
    count = 2 * load.hidden if options.norms else 0
    for group in load.groups:
        for name in group.recipe:
            rows, columns = group.linears[name]
            count += rows if options.scales else 0
            count += rank_of(group, name) * (rows + columns) if options.factors else 0
    return count


def training_bytes(loads: Sequence[Load], options: Distillation, texts: Texts, vocabulary: int) -> int:
    """Everything at a worker's peak: codes of all blocks (a byte each), what is kept of them, the ends of the model, the
    original's hidden states; and either what steps need (states, what enters every block, and the graph of the widest block
    with its dense weights, or the logits of one sequence), or the states that are averaged."""
    hidden = loads[0].hidden
    solved = [_solved(load) for load in loads]
    stored = sum(one + SINGLE * (load.parameters - one) for load, one in zip(loads, solved, strict=True))
    trained = SINGLE * sum(trained_parameters(load, options) for load in loads)
    ends = EMBEDDINGS * SINGLE * vocabulary * hidden
    targets = SINGLE * (texts.trained + texts.held_out) * texts.length * hidden
    tokens = options.batch * texts.length
    entered = SINGLE * tokens * hidden * len(loads)
    graph = max(_graph_bytes(load, tokens) for load in loads)
    logits = LOGITS * SINGLE * texts.length * vocabulary
    return stored + ends + targets + max(STEPPED * trained + entered + max(graph, logits), GATHERED * trained)


def state_traffic(parameters: int, options: Distillation) -> tuple[int, int]:
    """Bytes of states that all workers read and write together, when every epoch is run: in a round each replica reads all of
    the round before, or the epoch's; the end of an epoch reads all of the last round and what was kept; what is kept in the end
    is read once more."""
    state, replicas = RUNNING * SINGLE * parameters, options.replicas
    end = state + SINGLE * parameters
    read = options.epochs * ((options.rounds - 1) * replicas**2 + replicas) * state
    read += (options.epochs - 1) * (replicas + 1) * end + end
    written = options.epochs * (options.parts * state + end)
    return read, written


def _graph_bytes(load: Load, tokens: int) -> int:
    """What a block keeps for its gradients: the stream and its norms; of each linear its input, as it is and rounded, and its
    output, half of which are kept twice, behind positions and activation; dense weights."""
    kept = 10 * load.hidden + sum(group.share * (2 * group.width + 1.5 * group.outputs) for group in load.groups)
    dense = SINGLE * _solved(load)
    return round(SINGLE * tokens * kept) + dense + load.attention_bytes


def _solved(load: Load) -> int:
    """Weights of a block that are stored as codes."""
    return sum(prod(group.linears[name]) for group in load.groups for name in group.recipe)


def rank_of(group: Group, name: str) -> int:
    """Rank of a linear's branch as far as it is known beforehand: a budget's or an energy's at most."""
    rows, columns = group.linears[name]
    rank = group.recipe[name].compensation.branch_rank
    return 0 if rank is None else rank.at_most(rows, columns)
