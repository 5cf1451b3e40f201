"""Statistics of few tokens, shrunk toward those of a layer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.workers.calibration.experts import Starvation
from counterweight.workers.calibration.shrinkage import shrunk
from counterweight.workers.calibration.statistics import (
    Accumulator,
    Gathering,
    InputStatistics,
    PackedMoments,
    ShardMoments,
)

NOTHING_ELSE = Gathering()
EVERYTHING = Gathering(activations=ActivationFormat(bits=4), absolute=True, thresholds=True)


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def packed(gathering: Gathering, *shards: Tensor) -> PackedMoments:
    """The sums of these rows, in memory of their own."""
    sums = Accumulator(8, gathering=gathering)
    for shard in shards:
        sums.add(ShardMoments.of(shard, gathering))
    return sums.packed()


def shrink(own: Tensor | None, layer: Tensor, weight: int, gathering: Gathering = NOTHING_ELSE) -> InputStatistics:
    lack = Starvation(tokens=0, floor=1000, rows=len(layer), weight=weight)
    return shrunk(packed(gathering, *([] if own is None else [own])), packed(gathering, layer), lack).unpacked()


def near(found: Tensor | None, expected: Tensor | None) -> bool:
    assert found is not None
    assert expected is not None
    return bool((found - expected).norm() <= 1e-6 * expected.norm())


def test_every_sum_is_the_own_and_so_many_times_the_layers_mean() -> None:
    own, layer = (InputStatistics.of(rows(count, seed), EVERYTHING) for seed, count in ((0, 3), (1, 50)))
    found = shrink(rows(3, 0), rows(50, 1), 20, EVERYTHING)
    assert found.tokens == 23
    assert found.activations == own.activations
    for streams in ("xx", "xy", "yx", "yy"):
        assert near(found.product(streams), own.product(streams) + 20 * layer.product(streams) / 50)
    assert own.absolute is not None
    assert layer.absolute is not None
    assert near(found.absolute, own.absolute + 0.4 * layer.absolute)
    assert own.thresholds is not None
    assert layer.thresholds is not None
    assert near(found.thresholds, torch.maximum(own.thresholds, layer.thresholds))


def test_of_no_token_the_mean_is_the_layers() -> None:
    layer = InputStatistics.of(rows(50, 1), EVERYTHING)
    found = shrink(None, rows(50, 1), 16, EVERYTHING)
    assert near(found.mean_gram(), layer.mean_gram())
    assert near(found.product("xy"), layer.product("xy") * 0.32)
    assert found.gathering == layer.gathering


def test_of_many_tokens_the_layer_changes_little() -> None:
    own = InputStatistics.of(rows(4000, 0))
    found = shrink(rows(4000, 0), rows(50, 1), 4)
    assert (found.mean_gram() - own.mean_gram()).norm() < 0.01 * own.mean_gram().norm()


def test_the_layers_sums_stay_as_they_were() -> None:
    layer = packed(NOTHING_ELSE, rows(50, 1))
    before = layer.unpacked().gram.clone()
    shrunk(packed(NOTHING_ELSE, rows(3, 0)), layer, Starvation(tokens=3, floor=9, rows=50, weight=4))
    assert torch.equal(layer.unpacked().gram, before)


def test_it_refuses_what_does_not_belong_together() -> None:
    own, lack = packed(NOTHING_ELSE, rows(3, 0)), Starvation(tokens=3, floor=9, rows=50, weight=4)
    with pytest.raises(ValueError, match="no token"):
        shrunk(own, packed(NOTHING_ELSE), lack)
    with pytest.raises(ValueError, match="expected width 8 and None, not 4"):
        shrunk(own, PackedMoments.of(InputStatistics.of(torch.ones(2, 4))), lack)
    with pytest.raises(ValueError, match="expected width 8 and None, not 8, ActivationFormat"):
        shrunk(own, packed(EVERYTHING, rows(3, 0)), lack)


def test_its_cause_names_the_figures() -> None:
    cause = Starvation(tokens=3, floor=512, rows=4096, weight=256).cause
    assert cause.startswith("3 of 512 tokens: ")
    assert "4096 tokens of the layer" in cause
    assert cause.endswith("as 256")
