"""Arithmetic before calibration: rotated weights, and what is chosen from rows of the inputs."""

from __future__ import annotations

from counterweight.workers.footprint.load import Group, Load
from counterweight.workers.matrix_flops import NOTHING, Work

ROWS, FEW = 2048, 512  # `prepare.py` says the same, but imports torch


def preparing(load: Load) -> Work:
    """Of all groups."""
    return rotating(load) + sum((_choosing(load, group) for group in load.groups), NOTHING)


def rotating(load: Load) -> Work:
    """Of the rotations of all weights, which lie on the host."""
    return sum((_rotating(load, group) for group in load.groups), NOTHING)


def curious(load: Load) -> bool:
    """Whether rows of an input are looked at, for which the first shard runs through the block."""
    return any(_looks(group) for group in load.groups)


def scaled(load: Load) -> bool:
    """Whether an input is scaled before its statistics are gathered."""
    for group in load.groups:
        if group.scaled:
            part = next(iter(group.recipe.values()))
            # Behind a transform ASER finds no outliers to scale.
            if part.smoothing is not None or _online(load, group) is None:
                return True
    return False


def online_flops(load: Load, name: str, tokens: float, columns: int) -> Work:
    """Of the transform of the inputs [tokens, columns] of the linear `name`."""
    if load.rotation is None:
        return NOTHING
    return load.rotation.online_flops(load.family, name, tokens * columns, columns, load.heads)


def _rotating(load: Load, group: Group) -> Work:
    if load.rotation is None:
        return NOTHING
    linears = (linear for each in load.groups for linear in each.linears.items())
    # A block without attention has no heads, and no linear that would be rotated head by head.
    mixed = next((columns for name, (_, columns) in linears if name == load.family.output), 0)
    work = NOTHING
    for name, (rows, columns) in group.linears.items():
        work += load.rotation.rotate_flops(load.family, name, rows, columns, load.heads, mixed // load.heads)
    return work


def _choosing(load: Load, group: Group) -> Work:
    """Scales and clip of a group's input, for its first linear that has a recipe."""
    if not _looks(group):
        return NOTHING
    part = next(iter(group.recipe.values()))
    seen = min(ROWS, _every(min(load.shard, load.tokens) * group.share, ROWS))
    work = NOTHING
    if part.smoothing is not None and group.scaled:
        few = _every(seen, FEW)
        tried = part.weights.nearest_flops(group.outputs * group.width)
        if part.activations is not None:
            tried += part.activations.quantize_flops(few * group.width)
        online = _online(load, group)
        work += part.smoothing.search_flops(group.outputs, group.width, few, tried, online)
        work += part.smoothing.scale_flops(seen, group.width, online)
        for rows, columns in group.linears.values():
            # For the choices that follow, and in the block that is calibrated.
            work += part.smoothing.scale_flops(rows, columns, online) * 2
    if part.activations is not None:
        work += part.activations.clip_flops(seen * group.width)
    return work


def _looks(group: Group) -> bool:
    for part in group.recipe.values():
        searches = part.activations is not None and part.activations.clip == "search"
        if searches or part.smoothing is not None or part.compensation.needs_rows:
            return True
    return False


def _online(load: Load, group: Group) -> int | None:
    """Order of the transform of a group's input; None without one."""
    if load.rotation is None:
        return None
    name, (_, columns) = next(iter(group.linears.items()))
    return load.rotation.online_size(load.family, name, columns, load.heads)


def _every(tokens: float, wanted: int) -> int:
    """How many of the tokens are taken, evenly spaced, when about so many are wanted."""
    return -(-int(tokens) // max(1, int(tokens) // wanted))
