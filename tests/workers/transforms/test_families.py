"""The table of rotations knows every family and every linear of its blocks."""

from __future__ import annotations

import pytest

from counterweight.workers.architecture import FAMILIES
from counterweight.workers.skeleton import Skeleton
from counterweight.workers.transforms.families import WIRINGS
from tests.models import BASE, CASES


def test_the_families_are_those_of_the_architecture() -> None:
    assert set(WIRINGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_covers_every_linear_of_every_family(family: str) -> None:
    """Each linear's input comes from a norm, the heads or the product in an MLP, and each norm of the table exists."""
    wiring, case = WIRINGS[family], CASES[family]
    skeleton = Skeleton({**BASE, **case.config, "model_type": family})
    for index in range(skeleton.blocks):
        parameters = skeleton.anatomy.block_parameters(index)
        weights = {name.removesuffix(".weight") for name, shape in parameters.items() if len(shape) == 2}
        normed = {module for module in weights if wiring.norm_before(module) is not None}
        assert {wiring.norm_before(module) for module in normed} == set(wiring.reads)
        assert all(f"{norm}.weight" in parameters for norm in wiring.reads)
        written = {module for module in weights if wiring.writes_residual(module)}
        assert normed | written == weights
        assert not normed & written
        assert wiring.value in normed
