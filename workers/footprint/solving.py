"""Memory of the solves of a block's linears: what runs side by side, and what each leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from counterweight.workers import matrix_bytes
from counterweight.workers.footprint.load import Group, Load, moments, squares, streams
from counterweight.workers.footprint.weights import scaled
from counterweight.workers.matrix_bytes import DECODE, DOUBLE, SINGLE
from counterweight.workers.parallel import PARALLEL_WIDTH
from counterweight.workers.recipe import ModuleRecipe, solved_together


@dataclass(frozen=True, slots=True)
class _Job:
    """A solve of linears of one group. peak: beside the statistics; left: what stays of it; packed: the group's statistics as
    they were gathered, which an `alone` solve takes and otherwise the `last` one ends; squares: the same as it is solved
    with."""

    peak: int
    left: int
    packed: int
    squares: int
    alone: bool
    last: bool


def solving(load: Load) -> tuple[int, int]:
    """Statistics and solves that run side by side at their peak, with what was solved before; and what all solves leave."""
    groups = [_jobs(load, group) for group in load.groups]
    jobs = [job for own in groups for job in own]
    side_by_side = load.threads if any(group.width >= PARALLEL_WIDTH for group in load.groups if group.recipe) else 1
    waiting = sum(own[0].packed for own in groups if own)
    peak = waiting
    solved = 0
    for place, first in enumerate(jobs):
        running = jobs[place : place + side_by_side]
        taken = sum(job.packed for job in running if job.alone)
        peak = max(peak, solved + waiting - taken + sum(job.squares + max(job.packed, job.peak) for job in running))
        solved += first.left
        waiting -= first.packed if first.last else 0
    return peak, solved


def _jobs(load: Load, group: Group) -> list[_Job]:
    """Solves of a group's linears."""
    found: list[_Job] = []
    solves = list(solved_together(group.recipe, {name: rows for name, (rows, _) in group.linears.items()}))
    for together in solves:
        part = group.recipe[together[0]]
        shapes = [group.linears[name] for name in together]
        tokens = load.shard * load.shards * group.share
        left = sum(_left(part, rows, columns, load.source_bytes / load.parameters) for rows, columns in shapes)
        copies = 0 if scaled(load) == SINGLE * load.parameters and not load.gpu else SINGLE * sum(map(prod, shapes))
        found.append(
            _Job(
                peak=copies + _solve(part, shapes, tokens, streams(load, group)),
                left=left,
                packed=moments(load, group, DOUBLE),
                squares=squares(load, group),
                alone=len(solves) == 1,
                last=together is solves[-1],
            )
        )
    return found


def _solve(part: ModuleRecipe, shapes: Sequence[tuple[int, int]], tokens: float, streams: int) -> int:
    """Peak of one call of `solve`, beside its weights."""
    columns = shapes[0][1]
    rows = sum(rows for rows, _ in shapes)
    judging = max(_judging(part, one, columns, streams) for one, _ in shapes)
    if part.compensation.joint:
        return max(judging, *(part.compensation.solve_bytes(part.weights, one, columns, tokens) for one, _ in shapes))
    stacked = SINGLE * rows * columns
    taken = stacked if part.compensation.needs_rows else 0
    foreseen = part.compensation.foresee_bytes(columns)
    quantizing = max(part.weights.quantize_bytes(rows, columns) + foreseen // 4, foreseen)
    target = part.weights.target_bytes(rows, columns)
    aimed = stacked if target else 0
    codes = 2 * rows * columns
    compensating = max(SINGLE * one * columns + part.compensation.fit_bytes(one, columns, tokens) for one, _ in shapes)
    return stacked + max(target, taken + aimed + max(quantizing, codes + max(judging, compensating)))


def _judging(part: ModuleRecipe, rows: int, columns: int, streams: int) -> int:
    """The errors of a solved linear: it is read back, turned round, added to the rest (or kept apart, where there are more
    streams), and its product with the statistics taken; and the store of what is left."""
    entries = SINGLE * rows * columns
    branch = 0 if part.compensation.branch_rank is None else entries
    held = 2 * entries + branch + (entries if streams == 1 else 0)
    residual = 0 if part.residual is None else part.residual.store_bytes(rows, columns) + branch + 2 * entries
    return max(held + matrix_bytes.trace(rows, columns), entries + DECODE * rows * columns, residual)


def _left(part: ModuleRecipe, rows: int, columns: int, itemsize: float) -> int:
    """What is kept of a solved linear until it is written: codes of a byte, or of the bits that a byte holds, and scales; its
    residual store; and the branch's factors, in the source's dtype of `itemsize` bytes or codes of a byte."""
    stored = part.weights.stored_bits(rows, columns) // 8
    codes = max(stored, rows * columns) if part.weights.code_bits > 1 else stored
    residual = 0 if part.residual is None else rows * columns // 2
    rank, bits = part.compensation.branch_rank, part.compensation.branch_bits
    branch = 0 if rank is None else rank.at_most(rows, columns) * (rows + columns)
    return codes + residual + round(branch * (itemsize if bits is None else 1))
