"""Paired tests against every case counted."""

from __future__ import annotations

from itertools import product

import pytest

from counterweight.pipeline.judging.paired import bootstrap, mcnemar, p_value


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 3), (5, 2), (7, 7), (9, 1)])
def test_mcnemar_counts_every_way_that_items_could_have_gone(lost: int, won: int) -> None:
    """Which of the two got an item alone is a fair coin under the hypothesis: all 2^n outcomes, one by one."""
    outcomes = list(product((0, 1), repeat=lost + won))
    expected = sum(sum(outcome) >= lost for outcome in outcomes) / len(outcomes)
    assert mcnemar(lost=lost, won=won) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("drops", [[0.5, -0.1, 0.2, 0.3, 0.1], [1.0, 1.0, 1.5, 2.0], [-0.5, 0.1, 0.1], [0.0, 0.0]])
def test_the_bootstrap_is_near_the_share_of_all_resamples(drops: list[float]) -> None:
    mean = sum(drops) / len(drops)
    centred = [drop - mean for drop in drops]
    every = [sum(sample) / len(drops) for sample in product(centred, repeat=len(drops))]
    expected = 1.0 if mean <= 0 else sum(value >= mean - 1e-12 for value in every) / len(every)
    assert bootstrap(drops, draws=4000) == pytest.approx(expected, abs=0.03)


def test_right_and_wrong_are_counted_and_other_numbers_resampled() -> None:
    assert p_value([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]) == mcnemar(lost=3, won=0) == 1 / 8
    original, compressed = [2.0, 3.0, 2.5, 4.0], [1.0, 2.5, 2.0, 3.0]
    assert p_value(original, compressed) == bootstrap([1.0, 0.5, 0.5, 1.0])
    assert p_value(compressed, original) == 1.0
    assert p_value([], []) == 1.0
    with pytest.raises(ValueError, match="expected as many"):
        p_value([1.0], [])
