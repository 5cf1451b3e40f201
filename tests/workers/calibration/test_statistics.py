"""Second moments: against float64, merged in any way, always the same bits."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import TRIANGLE_BLOCK, Accumulator, InputStatistics, ShardMoments


def rows(tokens: int, width: int, *, seed: int = 0) -> Tensor:
    """[tokens, width] float32, channels of very different size and not centred."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 2, width)
    return torch.randn(tokens, width, generator=generator) * size + size * 0.5


def summed(shards: Sequence[ShardMoments], width: int) -> InputStatistics:
    accumulator = Accumulator(width)
    for shard in shards:
        accumulator.add(shard)
    return accumulator.result()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("width", [1, 32, TRIANGLE_BLOCK, TRIANGLE_BLOCK + 1, 300])
@pytest.mark.parametrize("shards", [1, 3])
def test_equal_float64_written_out(width: int, shards: int) -> None:
    x = rows(90, width)
    found = summed([ShardMoments.of(part) for part in x.chunk(shards)], width)
    exact = x.double()
    assert relative(found.gram, exact.T @ exact) < 1e-6
    assert relative(found.gram.diagonal(), exact.square().sum(0)) < 1e-6
    assert found.tokens == 90
    assert found.gram.dtype == torch.float64


def test_small_channels_are_as_exact_as_large_ones() -> None:
    x = rows(200, 40)
    exact = x.double().T @ x.double()
    scale = exact.diagonal().sqrt()
    error = (InputStatistics.of(x).gram - exact).abs() / (scale[:, None] * scale)
    assert error.max() < 1e-6


def test_is_exactly_symmetric() -> None:
    gram = InputStatistics.of(rows(64, 200)).gram
    assert torch.equal(gram, gram.T)


def test_leading_dimensions_are_tokens() -> None:
    x = rows(60, 16)
    found, flat = InputStatistics.of(x.view(3, 4, 5, 16)), InputStatistics.of(x)
    assert found.tokens == 60
    assert torch.equal(found.gram, flat.gram)


def test_sixteen_bit_rows_are_multiplied_in_float32() -> None:
    x = rows(50, 24).bfloat16()
    exact = x.double()
    assert relative(InputStatistics.of(x).gram, exact.T @ exact) < 1e-6


def test_workers_that_each_did_a_part_give_the_bits_of_one_that_did_all() -> None:
    parts = rows(120, 150).chunk(5)
    alone = summed([ShardMoments.of(part) for part in parts], 150)
    # Others compute the shards in their own order and send them; only the order of the sum is fixed.
    sent = {index: pickle.dumps(ShardMoments.of(parts[index])) for index in (3, 0, 4, 2, 1)}
    together = summed([pickle.loads(sent[index]) for index in range(5)], 150)
    assert torch.equal(together.gram, alone.gram)


def test_means() -> None:
    x = rows(70, 12)
    found = InputStatistics.of(x)
    assert relative(found.mean_gram(), x.double().T @ x.double() / 70) < 1e-6
    assert found.width == 12


def test_no_token_gives_zeros() -> None:
    for found in (Accumulator(6).result(), InputStatistics.of(torch.empty(0, 6))):
        assert found.tokens == 0
        assert torch.equal(found.mean_gram(), torch.zeros(6, 6, dtype=torch.float64))


def test_a_result_does_not_change_when_more_is_added() -> None:
    accumulator = Accumulator(8)
    accumulator.add(ShardMoments.of(rows(10, 8)))
    first = accumulator.result()
    before = first.gram.clone()
    accumulator.add(ShardMoments.of(rows(10, 8, seed=1)))
    assert torch.equal(first.gram, before)
    assert first.tokens == 10


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 5 cannot join statistics of width 6"):
        Accumulator(6).add(ShardMoments.of(rows(3, 5)))
