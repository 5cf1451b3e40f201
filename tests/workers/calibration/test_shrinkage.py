"""Statistics of few tokens, shrunk toward those of a layer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import ActivationFormat
from counterweight.workers.calibration.shrinkage import Starvation, shrunk
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics

EVERYTHING = Gathering(activations=ActivationFormat(bits=4), absolute=True, thresholds=True)


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def near(found: Tensor | None, expected: Tensor | None) -> bool:
    assert found is not None
    assert expected is not None
    return bool((found - expected).norm() <= 1e-6 * expected.norm())


def test_every_sum_is_the_own_and_so_many_times_the_layers_mean() -> None:
    own, layer = (InputStatistics.of(rows(count, seed), EVERYTHING) for seed, count in ((0, 3), (1, 50)))
    found = shrunk(own, layer, 20)
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
    own = Accumulator(8, gathering=EVERYTHING).result()
    layer = InputStatistics.of(rows(50, 1), EVERYTHING)
    found = shrunk(own, layer, 16)
    assert near(found.mean_gram(), layer.mean_gram())
    assert near(found.product("xy"), layer.product("xy") * 0.32)
    assert found.gathering == layer.gathering


def test_of_many_tokens_the_layer_changes_little() -> None:
    own, layer = InputStatistics.of(rows(4000, 0)), InputStatistics.of(rows(50, 1))
    found = shrunk(own, layer, 4)
    assert (found.mean_gram() - own.mean_gram()).norm() < 0.01 * own.mean_gram().norm()


def test_what_was_given_stays_as_it_was() -> None:
    own, layer = InputStatistics.of(rows(3, 0)), InputStatistics.of(rows(50, 1))
    before = own.gram.clone(), layer.gram.clone()
    shrunk(own, layer, 4)
    assert torch.equal(own.gram, before[0])
    assert torch.equal(layer.gram, before[1])


def test_it_refuses_what_does_not_belong_together() -> None:
    own, empty = InputStatistics.of(rows(3, 0)), Accumulator(8).result()
    with pytest.raises(ValueError, match="no token"):
        shrunk(own, empty, 4)
    with pytest.raises(ValueError, match="expected width 8 and None, not 4"):
        shrunk(own, InputStatistics.of(torch.ones(2, 4)), 4)
    with pytest.raises(ValueError, match="expected width 8 and None, not 8, ActivationFormat"):
        shrunk(own, InputStatistics.of(rows(3, 0), EVERYTHING), 4)


def test_a_record_names_the_figures() -> None:
    fallback = Starvation(tokens=3, floor=512, rows=4096, weight=256).fallback
    assert fallback.step == "experts.starved"
    assert fallback.cause.startswith("3 of 512 tokens: ")
    assert "4096 tokens of the layer" in fallback.cause
    assert fallback.cause.endswith("as 256")
