"""Memory of the solves of a block's linears: what runs side by side, and what each leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from counterweight.workers import matrix_bytes
from counterweight.workers.footprint.experts import summed_tokens
from counterweight.workers.footprint.forward import unseen_rows
from counterweight.workers.footprint.load import Load, moments, squares, streams
from counterweight.workers.footprint.solves import Solve, batched
from counterweight.workers.footprint.weights import scaled
from counterweight.workers.matrix_bytes import DECODE, DOUBLE, SINGLE
from counterweight.workers.recipe import ModuleRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Solves that are done in one call. peak: beside the statistics; left: what stays of them; taken, ended: the inputs'
    statistics as they were gathered, which solves that are `alone` take and otherwise the `last` one ends; squares: the same
    as they are solved with."""

    peak: int
    left: int
    taken: int
    ended: int
    squares: int


def solving(load: Load, *, keep: bool = False) -> tuple[int, int]:
    """Statistics and solves that run side by side at their peak, with what was solved before; and what all solves leave. keep:
    the statistics stay, for further solves."""
    in_place = scaled(load) == SINGLE * load.parameters and not load.gpu
    jobs = [_job(load, batch, in_place=in_place) for batch in batched(load)]
    if keep:
        jobs = [replace(job, taken=0, ended=0) for job in jobs]
    waiting = sum(moments(load, group, DOUBLE) for group in load.groups if group.recipe)
    peak = waiting
    solved = 0
    for place, first in enumerate(jobs):
        running = jobs[place : place + load.threads]
        held = sum(job.squares + max(job.taken or job.ended, job.peak) for job in running)
        peak = max(peak, solved + waiting - sum(job.taken for job in running) + held)
        solved += first.left
        waiting -= first.ended
    return peak, solved


def _job(load: Load, batch: Sequence[Solve], *, in_place: bool) -> _Job:
    """What solves that are done in one call take and leave. in_place: they work on the parameters as those lie in memory."""
    first, count = batch[0], len(batch)
    tokens = min(summed_tokens(load, solve.group) for solve in batch)
    left = sum(_left(first.part, *shape, load.source_bytes / load.parameters) for shape in first.shapes)
    copies = 0 if in_place else SINGLE * sum(map(prod, first.shapes))
    packed = [moments(load, solve.group, DOUBLE) for solve in batch]
    judging = max(_judging(load, first, one) for one, _ in first.shapes)
    at_once = first.at_once(count, load.batch_bytes)
    return _Job(
        peak=count * copies + max(judging, _solve(first, tokens, count, at_once, judging)),
        left=count * left,
        taken=sum(packed) if first.alone else 0,
        ended=sum(packed) if first.last else 0,
        squares=sum(squares(load, solve.group) for solve in batch),
    )


def _solve(solve: Solve, tokens: float, count: int, at_once: int, judging: int) -> int:
    """Peak of one call of `solve` for `count` inputs, beside its weights. at_once: see `Solve.at_once`; judging: of its errors
    and its store."""
    part, shapes = solve.part, solve.shapes
    columns = shapes[0][1]
    rows = sum(rows for rows, _ in shapes)
    if part.compensation.joint:
        return part.compensation.solve_bytes(
            part.weights, shapes[0][0], columns, tokens, at_once, siblings=len(shapes) > 1
        )
    stacked = SINGLE * rows * columns * count
    taken = stacked if part.compensation.needs_rows else 0
    foreseen = part.compensation.foresee_bytes(columns)
    kept = count * foreseen // 4
    quantizing = max(part.weights.quantize_bytes(rows, columns, count) + kept, kept + foreseen - foreseen // 4)
    # Targets of several inputs, and the same put together.
    quantizing = max(quantizing, stacked if count > 1 else 0)
    target = part.weights.target_bytes(rows, columns)
    aimed = stacked if target else 0
    codes = 2 * rows * columns * count
    compensating = max(SINGLE * one * columns + part.compensation.fit_bytes(one, columns, tokens) for one, _ in shapes)
    return stacked + max(target, taken + aimed + max(quantizing, codes + max(judging, compensating)))


def _judging(load: Load, solve: Solve, rows: int) -> int:
    """The errors of a solved linear with so many outputs, on tokens that it was not solved on or from its statistics; and the
    store of what is left."""
    part, columns = solve.part, solve.group.width
    entries = SINGLE * rows * columns
    branch = 0 if part.compensation.branch_rank is None else entries
    residual = 0 if part.residual is None else part.residual.store_bytes(rows, columns) + branch + 2 * entries
    if seen := unseen_rows(load, solve.group) if load.held_out else 0:
        # The input, as it is where it is not, and quantized; what was wanted, and what is left of it.
        inputs = SINGLE * seen * columns * ((load.compute != SINGLE) + (part.activations is not None))
        outputs = SINGLE * seen * rows
        # Read back; multiplied; squared, and the squares in float64.
        most = max(DECODE * rows * columns, entries + branch + outputs, (SINGLE + DOUBLE) * seen * rows)
        return max(inputs + 2 * outputs + most, residual)
    # Read back, turned round, added to the rest (or kept apart, where there are more streams); the product with the statistics.
    one = streams(load, solve.group) == 1
    summed = (matrix_bytes.square_trace if one else matrix_bytes.trace)(rows, columns)
    held = 2 * entries + branch + (entries if one else 0)
    return max(held + summed, entries + DECODE * rows * columns, residual)


def _left(part: ModuleRecipe, rows: int, columns: int, itemsize: float) -> int:
    """What is kept of a solved linear until it is written: codes of a byte, or of the bits that a byte holds, and scales; its
    residual store; and the branch's factors, in the source's dtype of `itemsize` bytes or codes of a byte."""
    stored = part.weights.stored_bits(rows, columns) // 8
    codes = max(stored, rows * columns) if part.weights.code_bits > 1 else stored
    residual = 0 if part.residual is None else rows * columns // 2
    rank, bits = part.compensation.branch_rank, part.compensation.branch_bits
    branch = 0 if rank is None else rank.at_most(rows, columns) * (rows + columns)
    return codes + residual + round(branch * (itemsize if bits is None else 1))
