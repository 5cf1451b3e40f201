"""Memory and arithmetic of training a compressed model as a whole, in float32. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from counterweight.workers.footprint.load import Group, Load
from counterweight.workers.matrix_bytes import SINGLE
from counterweight.workers.methods.distillation import Distillation

STATES = 13
"""Copies of what is trained: itself, its gradient, where it began, and two states of five tensors while an epoch runs."""

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
            count += _rank(group, name) * (rows + columns) if options.factors else 0
    return count


def training_bytes(loads: Sequence[Load], options: Distillation, texts: Texts, vocabulary: int) -> int:
    """Everything at the peak of a step: codes of all blocks (a byte each), what is kept of them, states of what is trained, the
    ends of the model, the original's hidden states, what enters every block, and the graph of the widest block with its dense
    weights, or the logits of one sequence."""
    hidden = loads[0].hidden
    solved = [_solved(load) for load in loads]
    stored = sum(one + SINGLE * (load.parameters - one) for load, one in zip(loads, solved, strict=True))
    states = STATES * SINGLE * sum(trained_parameters(load, options) for load in loads)
    ends = EMBEDDINGS * SINGLE * vocabulary * hidden
    targets = SINGLE * (texts.trained + texts.held_out) * texts.length * hidden
    tokens = options.batch * texts.length
    entered = SINGLE * tokens * hidden * len(loads)
    graph = max(_graph_bytes(load, tokens) for load in loads)
    logits = LOGITS * SINGLE * texts.length * vocabulary
    return stored + states + ends + targets + entered + max(graph, logits)


def training_flops(loads: Sequence[Load], options: Distillation, texts: Texts, vocabulary: int) -> int:
    """At most, when every epoch is run. Once the original over all texts; in an epoch, over what is trained on, forward twice
    (blocks are run again for their gradients), back to the inputs and to what is trained; over the held-out texts forward."""
    head = vocabulary * loads[0].hidden
    model = head + sum(_active(load) for load in loads)
    branches = sum(trained_parameters(load, options) for load in loads)
    trained, held_out = texts.trained * texts.length, texts.held_out * texts.length
    epoch = trained * 2 * (3 * (model + branches) + branches) + held_out * 2 * (model + branches)
    return (trained + held_out) * 2 * model + held_out * 2 * model + options.epochs * epoch


def _graph_bytes(load: Load, tokens: int) -> int:
    """What a block keeps for its gradients: the stream and its norms; of each linear its input, as it is and rounded, and its
    output, half of which are kept twice, behind positions and activation; dense weights."""
    kept = 10 * load.hidden + sum(group.share * (2 * group.width + 1.5 * group.outputs) for group in load.groups)
    dense = SINGLE * _solved(load)
    return round(SINGLE * tokens * kept) + dense + load.attention_bytes


def _solved(load: Load) -> int:
    """Weights of a block that are stored as codes."""
    return sum(prod(group.linears[name]) for group in load.groups for name in group.recipe)


def _active(load: Load) -> int:
    """Weights of a block that a token meets, in the mean."""
    return round(sum(group.share * prod(shape) for group in load.groups for shape in group.linears.values()))


def _rank(group: Group, name: str) -> int:
    """Rank of a linear's branch as far as it is known beforehand: a budget's or an energy's at most."""
    rows, columns = group.linears[name]
    rank = group.recipe[name].compensation.branch_rank
    return 0 if rank is None else rank.at_most(rows, columns)
