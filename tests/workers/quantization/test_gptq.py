"""GPTQ against brute force, against Optimal Brain Surgeon, and option by option."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ, RTN
from counterweight.workers.methods.scales import AbsoluteMaximum, MeanSquare
from counterweight.workers.quantization.grid import Grid
from tests.workers.quantization.problems import (
    best_of_all,
    damped,
    generator,
    layer,
    loss,
    of,
    optimal_brain_codes,
    row_losses,
)

PLAIN = GPTQ(act_order=False, refinement=0, scale=AbsoluteMaximum())


def solve(
    quantizer: GPTQ | RTN, weight: Tensor, statistics: InputStatistics, format: WeightFormat | None = None
) -> UniformWeight:
    result = quantizer.quantize(weight, statistics, format or WeightFormat(), scale_dtype=torch.float32)
    assert not result.fallbacks
    return result.weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_lies_between_the_optimum_and_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    weight, statistics = layer(rows=24, columns=4 if bits == 3 else 5)
    format = WeightFormat(bits=bits, symmetric=symmetric)
    nearest = solve(RTN(), weight, statistics, format)
    greedy = solve(PLAIN, weight, statistics, format)
    refined = solve(PLAIN.model_copy(update={"refinement": 10}), weight, statistics, format)
    assert torch.equal(greedy.scale, nearest.scale)
    optimum = best_of_all(weight, greedy, statistics)
    losses = [row_losses(weight, solved, statistics) for solved in (refined, greedy, nearest)]
    assert all(bool((found >= optimum * (1 - 1e-9)).all()) for found in losses)
    first, second, third = (float((found.sum() - optimum.sum()) / optimum.sum()) for found in losses)
    assert first < second < 0.5 * third


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_is_optimal_brain_surgeon(act_order: bool, symmetric: bool, group_size: int | None) -> None:
    weight, statistics = layer(rows=48, columns=64)
    quantizer = GPTQ(act_order=act_order, refinement=0, damping=0.02)
    solved = solve(quantizer, weight, statistics, WeightFormat(group_size=group_size, symmetric=symmetric))
    power = statistics.gram.diagonal()
    order = power.argsort(descending=True).tolist() if act_order else list(range(64))
    expected = optimal_brain_codes(weight, solved, damped(statistics, 0.02), order)
    # A float32 target may fall on the other side of a tie; that row then goes another, equally good way.
    assert (solved.codes == expected).all(1).float().mean() >= 0.95


def test_block_size_changes_speed_only() -> None:
    weight, statistics = layer(rows=32, columns=96)
    results = [solve(GPTQ(block_size=size), weight, statistics) for size in (1, 7, 64, 4096)]
    assert all((result.codes == results[0].codes).all(1).float().mean() >= 0.95 for result in results)


def test_act_order_rounds_the_strongest_first() -> None:
    losses = {True: 0.0, False: 0.0}
    for seed in range(3):
        weight, statistics = layer(rows=64, columns=96, seed=seed)
        for act_order in losses:
            quantizer = GPTQ(act_order=act_order, refinement=0, scale=AbsoluteMaximum())
            losses[act_order] += loss(weight, solve(quantizer, weight, statistics), statistics)
    assert losses[True] < 0.97 * losses[False]


def test_act_order_keeps_groups_in_place() -> None:
    weight, statistics = layer(rows=8, columns=96)
    format = WeightFormat(group_size=32)
    solved = solve(GPTQ(scale=AbsoluteMaximum()), weight, statistics, format)
    assert torch.equal(solved.scale, weight.unflatten(1, (3, 32)).abs().amax(2) / 7.5)


def test_permuting_the_input_permutes_the_codes() -> None:
    weight, statistics = layer(rows=32, columns=64)
    order = torch.randperm(64, generator=generator(5))
    permuted = InputStatistics(gram=statistics.gram[order][:, order], tokens=statistics.tokens)
    for quantizer in (GPTQ(refinement=0), GPTQ()):
        straight = solve(quantizer, weight, statistics)
        turned = solve(quantizer, weight[:, order], permuted)
        assert (turned.codes == straight.codes[:, order]).all(1).float().mean() >= 0.95


def test_rows_are_independent() -> None:
    weight, statistics = layer(rows=40, columns=64)
    together = solve(GPTQ(), weight, statistics, WeightFormat(group_size=32))
    parts = [solve(GPTQ(), part, statistics, WeightFormat(group_size=32)) for part in weight.split([7, 33])]
    assert torch.equal(torch.cat([part.scale for part in parts]), together.scale)
    same = (torch.cat([part.codes for part in parts]) == together.codes).all(1).float().mean()
    assert same >= 0.95


def test_same_input_same_bits() -> None:
    weight, statistics = layer(rows=32, columns=96)
    first, second = (solve(GPTQ(), weight, statistics) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)


def test_refinement_never_loses_and_stops_where_no_single_code_can_improve() -> None:
    weight, statistics = layer(rows=16, columns=48)
    hessian = damped(statistics, 0.01)
    metric = InputStatistics(gram=hessian, tokens=1)
    losses = [
        row_losses(weight, solve(GPTQ(refinement=passes), weight, statistics), metric) for passes in (0, 1, 2, 100)
    ]
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert losses[-1].sum() < 0.99 * losses[0].sum()
    solved = solve(GPTQ(refinement=100), weight, statistics)
    for column in range(48):
        for change in (-1, 1):
            codes = solved.codes.clone()
            codes[:, column] = (codes[:, column] + change).clamp(-8, 7)
            moved = row_losses(
                weight, Grid(format=WeightFormat(), scale=solved.scale, zero_point=None).with_codes(codes), metric
            )
            assert bool((moved >= losses[-1] * (1 - 1e-5)).all())


def test_damping_draws_codes_towards_the_nearest() -> None:
    weight, statistics = layer(rows=32, columns=64, tokens=80)
    nearest = solve(RTN(), weight, statistics).codes
    moved = [
        float((solve(PLAIN.model_copy(update={"damping": value}), weight, statistics).codes != nearest).float().mean())
        for value in (0.001, 0.1, 1.0)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_damping_helps_on_inputs_that_calibration_did_not_see() -> None:
    source = generator(3)
    mixing = torch.randn(64, 64, generator=source)
    seen, unseen = (of(torch.randn(tokens, 64, generator=source) @ mixing) for tokens in (70, 4000))
    weight = torch.randn(64, 64, generator=source)
    little, more = (
        loss(weight, solve(GPTQ(damping=value, act_order=False), weight, seen), unseen) for value in (1e-6, 0.05)
    )
    assert more < 0.9 * little


def test_an_outlier_channel_does_not_raise_the_damping_of_the_others() -> None:
    weight, statistics = layer(rows=32, columns=64)
    gram = torch.zeros(65, 65, dtype=torch.float64)
    gram[:64, :64], gram[64, 64] = statistics.gram, 1e6 * statistics.gram.diagonal().max()
    with_outlier = InputStatistics(gram=gram, tokens=statistics.tokens)
    wider = torch.cat([weight, torch.zeros(32, 1)], 1)
    alone, beside = solve(PLAIN, weight, statistics), solve(PLAIN, wider, with_outlier)
    assert loss(wider, beside, with_outlier) < 1.02 * loss(weight, alone, statistics)


def test_columns_that_later_ones_cannot_make_up_for_count_more_in_the_search() -> None:
    weight, statistics = layer(rows=64, columns=96)
    format = WeightFormat(bits=3)
    weighted, alike = (
        solve(GPTQ(refinement=0, scale=MeanSquare(weighted=value)), weight, statistics, format)
        for value in (True, False)
    )
    assert not torch.equal(weighted.scale, alike.scale)
    assert loss(weight, weighted, statistics) < loss(weight, alike, statistics)


def test_searched_scales_beat_the_whole_range() -> None:
    weight, statistics = layer(rows=64, columns=96)
    format = WeightFormat(bits=3)
    searched, whole = (
        loss(weight, solve(GPTQ(scale=scale), weight, statistics, format), statistics)
        for scale in (MeanSquare(), AbsoluteMaximum())
    )
    assert searched < 0.9 * whole


def test_dead_columns_are_rounded_to_nearest_and_counted() -> None:
    weight, statistics = layer(rows=16, columns=48)
    dead = torch.tensor([3, 17, 40])
    gram = statistics.gram.clone()
    gram[dead], gram[:, dead] = 0, 0
    result = PLAIN.quantize(weight, InputStatistics(gram=gram, tokens=9), WeightFormat(), scale_dtype=torch.float32)
    (fallback,) = result.fallbacks
    assert fallback.step == "gptq.dead_columns"
    assert fallback.cause.startswith("3 of 48")
    assert torch.equal(result.weight.codes[:, dead], solve(RTN(), weight, statistics).codes[:, dead])


@pytest.mark.parametrize("scale", [MeanSquare(), AbsoluteMaximum()])
def test_without_tokens_weights_are_rounded_to_nearest(scale: MeanSquare | AbsoluteMaximum) -> None:
    weight, statistics = layer(rows=16, columns=48)
    nothing = InputStatistics(gram=torch.zeros_like(statistics.gram), tokens=0)
    result = GPTQ(scale=scale).quantize(weight, nothing, WeightFormat(), scale_dtype=torch.float32)
    assert [fallback.step for fallback in result.fallbacks] == ["gptq.tokens"]
    alike = scale.model_copy(update={"weighted": False}) if isinstance(scale, MeanSquare) else scale
    assert torch.equal(result.weight.codes, solve(RTN(scale=alike), weight, statistics).codes)


def test_fewer_tokens_than_channels_is_no_fallback() -> None:
    weight, statistics = layer(rows=16, columns=48, tokens=10)
    greedy, nearest = (loss(weight, solve(quantizer, weight, statistics), statistics) for quantizer in (GPTQ(), RTN()))
    assert greedy < 0.2 * nearest


def indefinite(lowest: float) -> tuple[Tensor, InputStatistics]:
    """A "Gram matrix" with unit power in each channel and one eigenvalue of `lowest`, as no input can have."""
    common = (1 - lowest) / 47
    gram = (1 + common) * torch.eye(48, dtype=torch.float64) - common
    return torch.randn(16, 48, generator=generator(0)), InputStatistics(gram=gram, tokens=1)


def test_damping_is_raised_until_there_is_a_factor() -> None:
    weight, statistics = indefinite(-0.5)
    result = PLAIN.quantize(weight, statistics, WeightFormat(), scale_dtype=torch.float32)
    (fallback,) = result.fallbacks
    assert fallback.step == "gptq.damping"
    assert fallback.cause.endswith("raised to 1")
    expected = solve(PLAIN.model_copy(update={"damping": 1.0}), weight, statistics)
    assert torch.equal(result.weight.codes, expected.codes)


def test_without_any_factor_weights_are_rounded_to_nearest() -> None:
    weight, statistics = indefinite(-20)
    result = PLAIN.quantize(weight, statistics, WeightFormat(), scale_dtype=torch.float32)
    (fallback,) = result.fallbacks
    assert fallback.step == "gptq.cholesky"
    assert "10:" in fallback.cause
    assert torch.equal(result.weight.codes, solve(RTN(), weight, layer(16, 48)[1]).codes)


def test_one_column() -> None:
    weight = torch.tensor([[1.0], [-0.3], [0.0]])
    solved = solve(GPTQ(scale=AbsoluteMaximum()), weight, of(torch.ones(5, 1)), WeightFormat(bits=8))
    assert torch.allclose(solved.dequantize(), weight, atol=0.5 / 127)


@pytest.mark.parametrize(
    ("statistics", "match"),
    [
        (None, "statistics: none"),
        (InputStatistics(gram=torch.eye(7, dtype=torch.float64), tokens=7), "width 7: expected 8"),
        (InputStatistics(gram=torch.full((8, 8), torch.nan).double(), tokens=7), "holds NaN"),
    ],
)
def test_statistics_that_are_refused(statistics: InputStatistics | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GPTQ().quantize(torch.ones(2, 8), statistics, WeightFormat(), scale_dtype=torch.float32)
