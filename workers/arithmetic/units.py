"""Linears of a block that are calibrated and solved by one worker where several share it. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from counterweight.workers.arithmetic.forward import statistics
from counterweight.workers.arithmetic.solving import solving
from counterweight.workers.config import Config
from counterweight.workers.footprint.division import units_of
from counterweight.workers.footprint.load import Load


class Unit(Config):
    """linears: by their names in the block. flops: of their statistics and solves."""

    linears: tuple[str, ...]
    flops: int


def units(load: Load) -> tuple[Unit, ...]:
    """In order; none of a block whose codes are trained, which is done as a whole."""
    if any(part.tuning is not None for group in load.groups for part in group.recipe.values()):
        return ()
    return tuple(Unit(linears=names, flops=_flops(load.with_only(names))) for names in units_of(load))


def _flops(load: Load) -> int:
    return round((statistics(load) + solving(replace(load, passes=()))).total)
