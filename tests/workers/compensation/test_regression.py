"""Factors as they are stored, against a search by hand."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.workers.compensation.regression import stored


def branch() -> LowRank:
    """Rank 3 [24, 40]; of the second direction nothing, in the third one factor that stands out."""
    source = torch.Generator().manual_seed(0)
    up, down = torch.randn(24, 3, generator=source), torch.randn(3, 40, generator=source)
    up[:, 1], down[1] = 0, 0
    up[5, 2] = 9
    return LowRank(up=up, down=down)


def error(factors: Tensor, step: float, highest: int) -> float:
    return float(((factors / step).round().clamp(-highest, highest) * step - factors).square().sum())


def test_factors_without_bits_stay_as_they_are() -> None:
    given = branch()
    assert stored(given, None) is given


def test_eight_bits_reach_the_largest_factor() -> None:
    found = stored(branch(), 8)
    assert found.up_scale is not None
    assert torch.allclose(found.up_scale, torch.tensor([branch().up[:, 0].abs().max() / 127, 1.0, 9 / 127]))
    assert (found.product() - branch().product()).abs().max() < 0.03 * branch().product().abs().max()


@pytest.mark.parametrize(("bits", "shares"), [(8, [1.0]), (4, [1 - 0.05 * place for place in range(12)])])
def test_each_direction_has_the_step_with_the_least_error(bits: Literal[4, 8], shares: list[float]) -> None:
    given, highest = branch(), 2 ** (bits - 1) - 1
    found = stored(given, bits)
    assert found.up_scale is not None
    assert found.down_scale is not None
    for factors, codes, steps in (
        (given.up.T, found.up.T, found.up_scale),
        (given.down, found.down, found.down_scale),
    ):
        assert int(codes.abs().max()) <= highest
        for row, own, step in zip(factors, codes, steps, strict=True):
            least = min(error(row, float(row.abs().max()) * share / highest or 1.0, highest) for share in shares)
            assert float((own * step - row).square().sum()) == pytest.approx(least, rel=1e-4, abs=1e-6)


def test_four_bits_clip_where_that_loses_less() -> None:
    found = stored(branch(), 4)
    assert found.down_scale is not None
    assert float(found.down_scale[0]) < float(branch().down[0].abs().max()) / 7


def test_four_bits_take_half_of_eight() -> None:
    four, eight = stored(branch(), 4), stored(branch(), 8)
    assert eight.bits == 3 * (24 + 40) * 8 + 2 * 3 * 32
    assert four.bits == 3 * (24 + 40) * 4 + 2 * 3 * 32
