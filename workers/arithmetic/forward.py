"""Arithmetic of a block that runs: how often, on what, and what is gathered of it; and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from counterweight.workers.arithmetic.preparing import curious, online_flops, scaled
from counterweight.workers.footprint.experts import drawn_share, gathered_share, kept_rows, starving
from counterweight.workers.footprint.load import Group, Load, gathers, streams
from counterweight.workers.matrix_bytes import TRIANGLE_BLOCK
from counterweight.workers.matrix_flops import NOTHING, Work, elementwise, gram, product, steps
from counterweight.workers.methods.tuning import Tuning
from counterweight.workers.models.family import is_expert

ADDED = 4 / 3
"""Operations on an entry of a sum: 16 bytes are read and written, where an operation on float32 entries is taken for 12."""

STEPS = 4
"""Operations around a linear of a shard: itself, its share of finding an expert's rows, of the product between linears, and of
adding up."""


def forward(load: Load) -> Work:
    """All passes through the block but those of training."""
    once = run(load, load.all_tokens)
    work = once if load.passed else NOTHING
    for calibration in calibrations(load):
        work += once * passes(calibration) + again(calibration) + _beside(calibration)
        if curious(calibration):
            work += run(load, min(load.shard, load.tokens))
    if (options := tunes(load)) is not None:
        work += run(load, load.tokens) + once * ((1 + load.paired) * options.transforms)
    return work + propagating(load) if load.compressed else work


def propagating(load: Load) -> Work:
    """One pass through the compressed block, for the next one."""
    return sum((_branches(load, group) for group in load.groups), run(load, load.all_tokens))


def statistics(load: Load) -> Work:
    """Products of the inputs, once for each time that they are gathered."""
    options = tunes(load)
    again = 0 if options is None else options.transforms
    together = load.at_once
    work = sum((_moments(load, group, together) for group in load.groups), NOTHING) * again
    for calibration in calibrations(load):
        work += sum((_moments(calibration, group, together) for group in load.groups), NOTHING)
    return work


def tuning(load: Load) -> Work:
    """Training of codes: the passes, twice as much backward as forward, and what each linear needs."""
    if (options := tunes(load)) is None:
        return NOTHING
    ahead, back = options.passes(load.sequences)
    work = run(load, load.length) * (ahead + 2 * back)
    for group in load.groups:
        for name in group.recipe:
            work += options.train_flops(*group.linears[name], load.sequences)
    return work


def calibrations(load: Load) -> Iterator[Load]:
    """The block as it is calibrated: for solving; and before that on the original's inputs, where a budget is shared out by
    statistics that differ from those that it is solved with."""
    parts = [part for group in load.groups for part in group.recipe.values()]
    sharing = [part for part in parts if part.budget_bits is not None]
    # Sharing out looks at second moments, which not every branch that it was done for does.
    more = any(not (part.weights.looks_at_input or part.compensation.needs_products) for part in sharing)
    if sharing and (load.compressed or more or any(part.compensation.needs_rows for part in parts)):
        yield replace(load, compressed=False, paired=False)
    yield load


def passes(load: Load) -> int:
    """How often one calibration runs the block over all tokens: on its inputs; on the original's; and before inputs are scaled,
    for the outputs that other recipes share."""
    kept = not load.compressed or load.paired
    return 1 + load.paired + (kept and scaled(load))


def again(load: Load) -> Work:
    """The passes behind the first, where linears are solved in several: only the experts run that are solved after them."""
    work = NOTHING
    for one in load.by_pass()[1:]:
        groups = [group for group in one.groups if group.recipe or not is_expert(next(iter(group.linears)))]
        paired = one.paired and any(group.recipe and group.share == 1 for group in groups)
        work += run(replace(one, groups=groups), one.tokens) * (1 + paired)
        if any(group.recipe and drawn_share(one, group) for group in groups):
            work += run(replace(one, groups=groups), one.drawn_tokens)
    return work


def tunes(load: Load) -> Tuning | None:
    """How codes are trained; None where they are not."""
    return next((part.tuning for group in load.groups for part in group.recipe.values() if part.tuning), None)


def run(load: Load, tokens: float) -> Work:
    """One pass of so many tokens: linears, with the transforms of their inputs, and attention, whose queries are taken to be as
    wide as its values; its masked half is counted, because kernels differ in whether they skip it. Not counted: a recurrence in
    attention's place (Gated DeltaNet)."""
    work, together = NOTHING, load.at_once
    for group in load.groups:
        for name, (rows, columns) in group.linears.items():
            seen = tokens * group.share
            work += product(seen, columns, rows) + online_flops(load, name, seen, columns)
            work += steps(STEPS * -(-tokens // load.shard) / (together if group.of_expert else 1))
            if name == load.family.output:
                work += product(tokens, load.length, columns) * 2
    return work


def _beside(load: Load) -> Work:
    """What experts are run on beside what the router sends them, once."""
    if load.experts is None:
        return NOTHING
    tokens: float = load.tokens if load.experts.every_token else 0
    if any(starving(load, group) for group in load.groups):
        tokens = kept_rows(load)
    work = NOTHING
    for group in load.groups:
        for name, (rows, columns) in group.linears.items():
            if is_expert(name):
                work += product(tokens, columns, rows) + online_flops(load, name, tokens, columns)
    return work


def _branches(load: Load, group: Group) -> Work:
    """One pass through the low-rank branches of a group."""
    work = NOTHING
    for name, part in group.recipe.items():
        rank, (rows, columns) = part.compensation.branch_rank, group.linears[name]
        if rank is not None:
            work += product(load.all_tokens * group.share, rank.at_most(rows, columns), rows + columns)
    return work


def _moments(load: Load, group: Group, together: int) -> Work:
    """Products of a group's streams: a triangle of each with itself, a square of each two. together: experts of one launch."""
    if not gathers(load, group):
        return NOTHING
    count, tokens = streams(load, group), load.tokens * gathered_share(load, group)
    tokens += load.drawn_tokens * drawn_share(load, group) + (kept_rows(load) if starving(load, group) else 0)
    pairs = count * (count - 1) // 2
    part = next(iter(group.recipe.values()))
    quantized = NOTHING if part.activations is None else part.activations.quantize_flops(tokens * group.width)
    # Of each product of a shard: zeros, the product, and its strips added to the sum; on a GPU one kernel.
    each = 1 if load.gpu else 2 + -(-group.width // TRIANGLE_BLOCK)
    shards = load.shards + (-(-load.drawn_tokens // load.shard) if drawn_share(load, group) else 0)
    launched = steps(shards * (count + pairs) * each / (together if group.of_expert else 1))
    triangles = gram(tokens, group.width, TRIANGLE_BLOCK) * count
    # Of each product of a shard: an entry read as float32 or made at once, and added in float64.
    added = elementwise(shards * ADDED * group.width**2 * (count / 2 + pairs))
    return triangles + added + product(group.width, tokens, group.width) * pairs + quantized + launched
