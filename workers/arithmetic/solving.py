"""Arithmetic of the solves of a block's linears; those that are solved together are counted as one matrix, and the steps of a
batch once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from counterweight.workers import matrix_flops
from counterweight.workers.footprint.experts import summed_tokens
from counterweight.workers.footprint.forward import LIMIT
from counterweight.workers.footprint.load import Group, Load, streams
from counterweight.workers.footprint.solves import Solve, batched
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, product, product64
from counterweight.workers.recipe import ModuleRecipe

IN_KERNELS = 1 / 40
"""Of the steps over columns what is left where a kernel takes a block of 64: some 17 operations that are started and three
kernels of 30 us, in the place of 1216 operations (with two passes of refinement)."""


OF_A_MATRIX, OF_A_STEP = 100, 1 / 200
"""What a GPU starts for each matrix of a batch beside that: to put its input's moments in order, to factorize, judge and pack
it; and two kernels for its product of each block and pass. Counted with a profiler for a block of Qwen3-30B-A3B."""


def solving(load: Load) -> Work:
    """Of all groups."""
    solves = sum((_batch(load, batch) for batch in batched(load)), NOTHING)
    return solves + sum((_gains(load, group) for group in load.groups), NOTHING)


def _batch(load: Load, batch: Sequence[Solve]) -> Work:
    """Of solves that are done in one call, whose steps over columns are taken by many of their matrices at once."""
    first, count = batch[0], len(batch)
    loops = len(first.shapes) if first.part.compensation.joint else 1  # of one alone, as `solve` counts them
    each = [
        solve(
            one.part,
            one.shapes,
            summed_tokens(load, one.group),
            streams=streams(load, one.group),
            original=load.paired and one.group.share == 1,
            in_sample=not load.held_out,
        )
        for one in batch
    ]
    judged = sum((_judging_rows(load, one) for one in batch), NOTHING)
    launched = each[0].steps * (IN_KERNELS if load.gpu else 1) / loops * first.loops(count, load.batch_bytes)
    of_each = count * (loops * OF_A_MATRIX + each[0].steps * OF_A_STEP) if load.gpu else 0
    return replace(sum(each, judged), steps=launched + of_each)


def _gains(load: Load, group: Group) -> Work:
    """Of sharing out a budget of ranks."""
    asked = [name for name, part in group.recipe.items() if part.budget_bits is not None]
    tokens = summed_tokens(load, group)
    return sum((gains(group.recipe[name], *group.linears[name], tokens) for name in asked), NOTHING)


def solve(
    part: ModuleRecipe,
    shapes: Sequence[tuple[int, int]],
    tokens: float,
    *,
    streams: int,
    original: bool,
    in_sample: bool = True,
) -> Work:
    """One call of `workers.solve.solve` for linears of these shapes, and their stores. streams: see `load.streams`; original:
    whether the input in the original model is one of them; in_sample: with their errors on the tokens of the statistics."""
    columns = shapes[0][1]
    stacked = sum(rows for rows, _ in shapes)
    work = NOTHING
    if part.tuning is None and not part.compensation.joint:
        work += part.weights.target_flops(stacked, columns) + part.weights.quantize_flops(stacked, columns)
        work += part.compensation.foresee_flops(shapes[0][0], columns)
    if part.compensation.joint:
        # Of one shape.
        work += part.compensation.solve_flops(
            part.weights, shapes[0][0], columns, tokens, len(shapes), original=original, activations=part.activations
        )
    for rows, _ in shapes:
        if not part.compensation.joint:
            work += _left(rows, columns) + part.compensation.fit_flops(rows, columns, tokens)
        work += _stored(part, rows, columns)
        if in_sample:
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
    energy = matrix_flops.square_trace64(rows, columns)
    return problem + whitened + energy + matrix_flops.spectrum(rows, columns)


def _judging_rows(load: Load, one: Solve) -> Work:
    """The errors of solved linears on tokens that they were not solved on: the output, the codes', and the branch's."""
    tokens, part, work = min(LIMIT, load.unseen * one.group.share), one.part, NOTHING
    if not tokens:
        return work
    rank = part.compensation.branch_rank
    for rows, columns in one.shapes:
        branch = NOTHING if rank is None else product(rows, rank.at_most(rows, columns), columns)
        quantized = NOTHING if part.activations is None else part.activations.quantize_flops(tokens * columns)
        work += product(tokens, columns, rows) * (2 + (rank is not None)) + branch + quantized
        work += NOTHING if rank is None else _spectrum(tokens, rows, columns, rank.at_most(rows, columns))
        work += elementwise(2 * rows * columns)
    return work


def _spectrum(tokens: float, rows: int, columns: int, rank: int) -> Work:
    """Of what a branch adds: its factor of the tokens, both factors' triangles, and their product's singular values."""
    inner, outer = min(tokens, rank), min(rows, rank)
    triangles = matrix_flops.qr(max(tokens, rank), inner) + matrix_flops.qr(max(rows, rank), outer)
    return product(tokens, columns, rank) + triangles + product64(inner, rank, outer) + matrix_flops.svd(inner, outer)


def _left(rows: int, columns: int) -> Work:
    """What codes, read back, leave of a weight."""
    return elementwise(2 * rows * columns)


def _judging(part: ModuleRecipe, rows: int, columns: int, streams: int) -> Work:
    """The errors of a solved linear without and with its branch, over the energy of its output, from second moments.

    An error is one square where codes and weight see one stream, otherwise three terms and those of the branch."""
    rank, entries = part.compensation.branch_rank, rows * columns
    # The energy and the codes, read back; the error.
    square = matrix_flops.square_trace(rows, columns)
    work = square * 2 + elementwise(4 * entries if streams == 1 else 3 * entries)
    if streams > 1:
        work += matrix_flops.trace(rows, columns)
    if rank is not None:
        most = rank.at_most(rows, columns)
        if streams == 1:
            work += product(rows, most, columns) + square + elementwise(entries)
        else:
            work += matrix_flops.branch_terms(rows, columns, most, streams)
    return work


def _stored(part: ModuleRecipe, rows: int, columns: int) -> Work:
    """The residual store of what codes and branch leave."""
    if part.residual is None:
        return NOTHING
    rank = part.compensation.branch_rank
    branch = NOTHING if rank is None else product(rows, rank.at_most(rows, columns), columns)
    return _left(rows, columns) + branch + part.residual.store_flops(rows, columns)
