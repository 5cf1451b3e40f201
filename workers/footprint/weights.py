"""Memory of a block's weights: as they are read, rotated, scaled, and as they run."""

from __future__ import annotations

from math import prod

from counterweight.workers.footprint.load import Load, scales
from counterweight.workers.matrix_bytes import SINGLE
from counterweight.workers.models.family import is_expert


def unscaled(load: Load) -> int:
    """The block's parameters as they are read, in the recipe's coordinates: rotated ones are float32."""
    return load.source_bytes if load.rotation is None else SINGLE * load.parameters


def scaled(load: Load) -> int:
    """The same as they are solved: those whose inputs were scaled are float32."""
    scaled = any(scales(part) for group in load.groups for part in group.recipe.values())
    return SINGLE * load.parameters if scaled else unscaled(load)


def lent(load: Load) -> int:
    """Parameters of the block that run as they were read, one linear at a time."""
    if not load.lends:
        return 0
    return sum(prod(shape) for group in load.groups for name, shape in group.linears.items() if is_expert(name))


def running(load: Load) -> int:
    """Of the block's parameters, as they run; of those that are lent one linear in each thread."""
    borrowed = lent(load)
    shapes = [shape for group in load.groups for name, shape in group.linears.items() if borrowed and is_expert(name)]
    return load.compute * (load.parameters - borrowed + load.threads * max(map(prod, shapes), default=0))


def with_running(load: Load, read: int) -> int:
    """Parameters and what runs of them: on a CPU one tensor where the dtype is the same."""
    return read if read == load.compute * load.parameters and not load.gpu else read + running(load)


def here(load: Load, read: int) -> int:
    """What of them lies where the arithmetic is done: on a GPU only what runs."""
    return running(load) if load.gpu else with_running(load, read)


def let_go(load: Load, done: Load) -> int:
    """Bytes of the experts' weights that are dropped when the linears of `done` are solved."""
    if not load.lends or load.gpu:
        return 0
    solved = [group.linears[name] for group in done.groups for name in group.recipe if is_expert(name)]
    return round(scaled(load) / load.parameters * sum(map(prod, solved)))


def original(load: Load) -> int:
    """What runs of the block as it was, which makes the outputs where another one is solved."""
    changed = any(scales(part) for group in load.groups for part in group.recipe.values())
    made = not load.compressed or load.paired
    if not (changed and made):
        return 0
    # Experts that are lent are those that were read.
    return running(load) + (0 if load.gpu else round(unscaled(load) / load.parameters * lent(load)))


def reading(load: Load) -> int:
    """What is read, and rotated, at the peak; on the host."""
    if load.rotation is None:
        return load.source_bytes
    return load.source_bytes + unscaled(load) + (0 if load.gpu else rotating(load))


def rotating(load: Load) -> int:
    """The widest weight while it is rotated, where the arithmetic is done."""
    if load.rotation is None:
        return 0
    widest = max((shape for group in load.groups for shape in group.linears.values()), key=prod, default=(0, 0))
    return load.rotation.rotate_bytes(*widest)


def loading(load: Load) -> int:
    """Reading the block and filling the one that runs, where the arithmetic is done."""
    if load.gpu:
        return max(rotating(load), running(load))
    return max(reading(load), with_running(load, unscaled(load)))


def preparing(load: Load) -> int:
    """Choices from the first shard's rows, before there are statistics; then the block that is scaled, beside what it was."""
    before = here(load, unscaled(load))
    curious = [group for group in load.groups if any(scales(part) for part in group.recipe.values())]
    if not curious:
        return before
    rows = sum(SINGLE * min(2048, load.shard, load.tokens) * group.width for group in curious)
    peaks = []
    for group in curious:
        part = next(iter(group.recipe.values()))
        copies = 0 if unscaled(load) == SINGLE * load.parameters else SINGLE * group.outputs * group.width
        searching = 0 if part.smoothing is None else part.smoothing.search_bytes(group.outputs, group.width)
        peaks.append(copies + searching)
    return before + max(rows + max(peaks), SINGLE * load.parameters)
