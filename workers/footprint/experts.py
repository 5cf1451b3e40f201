"""What the calibration of experts adds to a block's task: tokens of the layer that are kept, and experts run on them."""

from __future__ import annotations

from counterweight.workers.footprint.load import Group, Load, gathers, moments
from counterweight.workers.matrix_bytes import DOUBLE, SINGLE

STRETCH = 1024  # `coverage.py` says the same, but imports torch


def gathered_share(load: Load, group: Group) -> float:
    """Share of the tokens that a group's statistics are gathered on: that which reaches it, or all where experts see all."""
    return 1.0 if group.of_expert and load.experts is not None and load.experts.every_token else group.share


def drawn_share(load: Load, group: Group) -> float:
    """Share of the drawn tokens that a group's statistics are gathered on: that which reaches it, where the average expert sees
    fewer of the others than the floor; that single ones do is not known ahead."""
    return group.share if load.drawn and _lacking(load, group, load.tokens) else 0.0


def starving(load: Load, group: Group) -> bool:
    """Whether the average expert sees fewer tokens than the floor, those of drawn sequences included."""
    return _lacking(load, group, load.tokens + load.drawn_tokens)


def _lacking(load: Load, group: Group, tokens: int) -> bool:
    if load.experts is None or not group.of_expert or not _looks(load, group):
        return False
    return load.experts.lacking(group.width, tokens * group.share)


def kept_rows(load: Load) -> int:
    """Tokens of the layer that are kept for experts that may turn out to be starved."""
    if load.experts is None or not load.experts.samples:
        return 0
    if not any(group.of_expert and (_looks(load, group) or not group.recipe) for group in load.groups):
        return 0
    return load.experts.kept_of(load.hidden, load.tokens)


def _looks(load: Load, group: Group) -> bool:
    """Whether the group's tokens are looked at, and not only counted."""
    others = (part.residual is not None or part.compensation.needs_magnitudes for part in group.recipe.values())
    return gathers(load, group) or any(others)


def kept_bytes(load: Load) -> int:
    """Memory of these tokens."""
    return load.compute * kept_rows(load) * load.hidden


def summed_tokens(load: Load, group: Group) -> float:
    """Tokens that a group's statistics count as when it is solved."""
    own = load.tokens * gathered_share(load, group) + load.drawn_tokens * drawn_share(load, group)
    return own + load.experts.weight_of(group.width) if load.experts is not None and starving(load, group) else own


def feeding(load: Load) -> int:
    """Of the experts of one pass over the shards: tokens of the layer run through one of the largest kind, and its sums beside
    those that they are added to."""
    experts = [group for group in load.groups if group.recipe and group.of_expert]
    if not experts or not kept_rows(load):
        return 0
    ahead = load.compute * min(kept_rows(load), STRETCH) * max(group.width + 2 * group.outputs for group in experts)
    products = max(moments(load, group, SINGLE) for group in experts)
    return ahead + products + sum(moments(load, group, DOUBLE) for group in experts[:2])
