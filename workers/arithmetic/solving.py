"""Arithmetic of the solves of a block's linears; those that are solved together are counted as one matrix."""

from __future__ import annotations

from collections.abc import Sequence

from counterweight.workers import matrix_flops
from counterweight.workers.footprint.experts import summed_tokens
from counterweight.workers.footprint.forward import LIMIT
from counterweight.workers.footprint.load import Group, Load, streams
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, product, product64
from counterweight.workers.recipe import ModuleRecipe, solved_together


def solving(load: Load) -> Work:
    """Of all groups."""
    return sum((_group(load, group) for group in load.groups), NOTHING)


def _group(load: Load, group: Group) -> Work:
    work = NOTHING
    if not group.recipe:
        return work
    tokens, count = summed_tokens(load, group), streams(load, group)
    original = load.paired and group.share == 1
    for together in solved_together(group.recipe, {name: rows for name, (rows, _) in group.linears.items()}):
        part, shapes = group.recipe[together[0]], [group.linears[name] for name in together]
        work += solve(part, shapes, tokens, streams=count, original=original)
        for rows, columns in shapes:
            work += _judging_rows(part, rows, columns, min(LIMIT, load.unseen * group.share))
    for name, part in group.recipe.items():
        if part.budget_bits is not None:
            work += gains(part, *group.linears[name], tokens)
    return work


def solve(
    part: ModuleRecipe, shapes: Sequence[tuple[int, int]], tokens: float, *, streams: int, original: bool
) -> Work:
    """One call of `workers.solve.solve` for linears of these shapes, and their errors. streams: see `load.streams`; original:
    whether the input in the original model is one of them."""
    columns = shapes[0][1]
    stacked = sum(rows for rows, _ in shapes)
    work = NOTHING
    if part.tuning is None and not part.compensation.joint:
        work += part.weights.target_flops(stacked, columns) + part.weights.quantize_flops(stacked, columns)
        work += part.compensation.foresee_flops(shapes[0][0], columns)
    for rows, _ in shapes:
        if part.compensation.joint:
            work += part.compensation.solve_flops(
                part.weights, rows, columns, tokens, original=original, activations=part.activations
            )
        else:
            work += _left(rows, columns) + part.compensation.fit_flops(rows, columns, tokens)
        work += _judging(part, rows, columns, streams)
    return work


def gains(part: ModuleRecipe, rows: int, columns: int, tokens: float) -> Work:
    """One call of `workers.solve.gains` for a linear [rows, columns], on the original's inputs."""
    problem = part.compensation.gain_flops(rows, columns, tokens, original=False)
    if problem is None:
        codes = part.weights.target_flops(rows, columns) + part.weights.quantize_flops(rows, columns)
        problem = codes + _left(rows, columns) * 2 + matrix_flops.root(columns, definite=tokens >= columns)
    # Behind the metric's root, and the original output's energy.
    whitened = product64(rows, columns, columns)
    return problem + whitened * 2 + matrix_flops.spectrum(rows, columns) + elementwise(2 * rows * columns)


def _judging_rows(part: ModuleRecipe, rows: int, columns: int, tokens: float) -> Work:
    """The errors of a solved linear on tokens that it was not solved on: the output, the codes', and the branch's."""
    if not tokens:
        return NOTHING
    rank = part.compensation.branch_rank
    branch = NOTHING if rank is None else product(rows, rank.at_most(rows, columns), columns)
    terms = 2 + (rank is not None)
    quantized = NOTHING if part.activations is None else part.activations.quantize_flops(tokens * columns)
    return product(tokens, columns, rows) * terms + branch + quantized + elementwise(2 * rows * columns)


def _left(rows: int, columns: int) -> Work:
    """What codes, read back, leave of a weight."""
    return elementwise(2 * rows * columns)


def _judging(part: ModuleRecipe, rows: int, columns: int, streams: int) -> Work:
    """The errors of a solved linear without and with its branch, over the energy of its output; and the store of what is left.

    An error is one square where codes and weight see one stream, otherwise every product of two of its terms."""
    rank, entries = part.compensation.branch_rank, rows * columns
    plain, branched = (1, 1) if streams == 1 else (4, 9)
    # The energy and the codes, read back; the error, whose terms are negated and, in one stream, added.
    trace = matrix_flops.trace(rows, columns)
    work = trace * (1 + plain) + elementwise(entries * (4 if streams == 1 else 2))
    branch = NOTHING
    if rank is not None:
        branch = product(rows, rank.at_most(rows, columns), columns)
        work += branch + trace * branched + elementwise(entries * (5 if streams == 1 else 2))
    if part.residual is not None:
        work += _left(rows, columns) + branch + part.residual.store_flops(rows, columns)
    return work
