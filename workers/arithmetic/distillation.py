"""Arithmetic of training a compressed model as a whole. Torch-free.

Products alone: what is done on entries (rounding of inputs, probabilities, Adam, the mean of replicas) is of lower order. It
does not depend on how many replicas share the sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from counterweight.workers.arithmetic.forward import run
from counterweight.workers.footprint.distillation import Texts, rank_of
from counterweight.workers.footprint.load import Load
from counterweight.workers.matrix_flops import NOTHING, Work, product
from counterweight.workers.methods.distillation import Distillation


def training_flops(loads: Sequence[Load], options: Distillation, texts: Texts, vocabulary: int) -> int:
    """At most, when every epoch is run. Once the original's blocks over all texts; before the first epoch and behind every one
    the model over the held-out texts; in an epoch, over what is trained on, forward twice (blocks are run again for their
    gradients) and back to the inputs and the factors. Of a token that is predicted the original's head too."""
    trained, held_out = texts.trained * texts.length, texts.held_out * texts.length
    head = product(1, loads[0].hidden, vocabulary)
    original = _sum(run(load, trained + held_out) for load in loads)
    measure = _sum(_forward(load, held_out) for load in loads) + head * (2 * held_out)
    steps = _sum(_step(load, options, trained) for load in loads) + head * (3 * trained)
    return round((original + measure * (options.epochs + 1) + steps * options.epochs).products32)


def _forward(load: Load, tokens: float) -> Work:
    """A block with its branches."""
    return run(load, tokens) + _branches(load, tokens)


def _step(load: Load, options: Distillation, tokens: float) -> Work:
    """Forward twice, back to the inputs, where attention's scores are made once more, and to the factors."""
    factors = _branches(load, tokens) if options.factors else NOTHING
    return _forward(load, tokens) * 3 + _attention(load, tokens) * 1.5 + factors


def _attention(load: Load, tokens: float) -> Work:
    """Scores, and the values that they mix."""
    outputs = (
        columns for group in load.groups for name, (_, columns) in group.linears.items() if name == load.family.output
    )
    return _sum(product(tokens, load.length, columns) * 2 for columns in outputs)


def _branches(load: Load, tokens: float) -> Work:
    """All low-rank branches of a block, ranks as far as they are known beforehand."""
    return _sum(
        product(tokens * group.share, rank_of(group, name), sum(group.linears[name]))
        for group in load.groups
        for name in group.recipe
    )


def _sum(parts: Iterable[Work]) -> Work:
    return sum(parts, NOTHING)
