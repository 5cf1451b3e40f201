"""Evenly spaced tokens of a stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.row_sample import RowSample


def sampled(limit: int, *shards: int) -> Tensor | None:
    """Of rows that are numbered through all shards."""
    sample, numbers = RowSample(limit), torch.arange(sum(shards)).float()[:, None]
    for shard in numbers.split(list(shards)):
        sample.add(shard)
    return sample.rows()


@pytest.mark.parametrize(("limit", "step"), [(64, 1), (32, 2), (63, 2), (10, 8), (1, 64)])
def test_every_sth_row_stays_and_no_more_than_the_limit(limit: int, step: int) -> None:
    found = sampled(limit, 16, 16, 16, 16) if step <= 16 else sampled(limit, 64)
    assert found is not None
    assert found[:, 0].tolist() == list(range(0, 64, step))
    assert len(found) <= limit


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 1000])
def test_the_plan_knows_how_many_stay(tokens: int) -> None:
    found = sampled(32, tokens)
    assert found is not None
    assert len(found) == ExpertCalibration(sample=4.0).kept_of(8, tokens)


def test_of_more_shards_than_rows_one_row_of_each_stays() -> None:
    found = sampled(3, 2, 2, 2, 2, 2)
    assert found is not None
    assert found[:, 0].tolist() == [0, 2, 4, 6, 8]


def test_nothing_makes_nothing() -> None:
    assert RowSample(3).rows() is None
    assert sampled(3, 0) is None


def test_it_keeps_copies_of_little() -> None:
    sample = RowSample(4)
    sample.add(torch.zeros(1000, 2))
    found = sample.rows()
    assert found is not None
    assert sample.bytes == found.untyped_storage().nbytes() == 4 * 2 * 4
