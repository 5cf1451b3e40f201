"""The searched clip: the best of its candidates, and what it is best at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.calibration.clipping import activation_format, best_clip
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.calibration.thresholds import Thresholds
from counterweight.workers.methods.activations import CLIPS, Activations


def rows(seed: int = 0) -> Tensor:
    return torch.randn(200, 64, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, asked: Activations, clip: float) -> float:
    return float((fake_quantize_activations(x, activation_format(asked, clip)) - x).square().sum())


@pytest.mark.parametrize("group_size", [None, 32])
def test_no_other_candidate_has_a_smaller_error(group_size: int | None) -> None:
    asked = Activations(bits=4, clip="search", group_size=group_size)
    found = best_clip(rows(), asked)
    assert all(error(rows(), asked, found) <= error(rows(), asked, clip) for clip in CLIPS)


def test_fewer_bits_give_up_more_of_the_range() -> None:
    four, eight = (best_clip(rows(), Activations(bits=bits, clip="search")) for bits in (4, 8))
    assert four < 1
    assert four < eight
    assert best_clip(torch.zeros(3, 8), Activations(bits=4, clip="search")) == 1  # of equals, the largest


def test_a_clip_that_is_given_is_taken_and_one_that_is_searched_is_filled_in() -> None:
    assert activation_format(Activations(bits=4, clip=0.9)) == ActivationFormat(bits=4, clip=0.9)
    assert activation_format(Activations(bits=6, clip="search"), 0.8) == ActivationFormat(bits=6, clip=0.8)


def test_moments_of_the_quantized_input_are_those_of_its_rows() -> None:
    """Streams, magnitudes and thresholds over shards, against the whole in float64."""
    x, meant = rows(), rows(1)
    format = ActivationFormat(bits=4, clip=0.8)
    gathering = Gathering(activations=format, absolute=True, thresholds=True)
    accumulator = Accumulator(64, gathering=gathering)
    for part, original in zip(x.chunk(3), meant.chunk(3), strict=True):
        accumulator.add(ShardMoments.of(part, gathering, original))
    found = accumulator.result()
    streams = {"x": x.double(), "y": fake_quantize_activations(x, format).double(), "t": meant.double()}
    assert found.streams == set(streams)
    for one, first in streams.items():
        for other, second in streams.items():
            assert torch.allclose(found.product(one + other), first.T @ second, rtol=1e-4, atol=1e-3)
    assert found.absolute is not None
    assert torch.allclose(found.absolute, x.double().abs().sum(0), rtol=1e-5)
    assert found.thresholds is not None
    assert torch.equal(found.thresholds, Thresholds.of(x))
    assert found.gathering == gathering


def test_a_stream_that_was_not_gathered_is_the_input_itself() -> None:
    found = InputStatistics.of(rows())
    for streams in ("xy", "ty", "yy", "tt", "yx"):
        assert torch.equal(found.product(streams), found.gram)
