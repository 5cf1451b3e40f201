"""Grids: what every search must respect, and each option of the searches."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN, AnyQuantizer
from counterweight.workers.methods.scales import AbsoluteMaximum, MeanSquare, ScaleSearch
from tests.workers.kinds import KINDS, Layer
from tests.workers.quantization.problems import generator, layer, of

BITS = (2, 3, 4, 8)


def error(weight: Tensor, search: ScaleSearch, format: WeightFormat, importance: Tensor | None = None) -> Tensor:
    """sum_j importance_j (q(w_j) - w_j)^2 of each row on the fitted grid."""
    grid = search.fit(weight, format, torch.float32, importance)
    squares = (grid.round(weight).dequantize() - weight).square()
    return (squares if importance is None else squares * importance).sum(1)


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((None, 32)),
    symmetric=st.booleans(),
    searched=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    exponent=st.integers(-30, 4),
    seed=st.integers(0, 2**31),
)
def test_every_grid(
    bits: int, group_size: int | None, symmetric: bool, searched: bool, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    source = generator(seed)
    weight = torch.randn(7, 64, generator=source) * 2.0**exponent
    weight[0], weight[1], weight[2, 5] = 0, 2.0**exponent, 0
    format = WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    search = MeanSquare() if searched else AbsoluteMaximum()
    grid = search.fit(weight, format, dtype, None)
    solved = grid.round(weight)
    groups = 64 // (group_size or 64)
    assert solved.scale.shape == (7, groups)
    assert solved.scale.dtype == dtype
    assert bool(torch.isfinite(solved.scale).all())
    assert bool((solved.scale != 0).all())
    assert solved.codes.dtype == torch.int8
    assert solved.codes.min() >= format.lowest
    assert solved.codes.max() <= format.highest
    if symmetric:
        assert solved.zero_point is None
    else:
        assert solved.zero_point is not None
        assert solved.zero_point.shape == (7, groups)
        assert solved.zero_point.min() >= format.lowest
        assert solved.zero_point.max() <= format.highest
    value = solved.dequantize()
    assert not value[0].any()
    if not searched:
        step = solved.scale.float().repeat_interleave(64 // groups, 1)
        # The scale is rounded to its dtype, so the ends of the range may lie a little beyond half a step.
        slack = 0.5 + (2**bits) * torch.finfo(dtype).eps
        assert bool(((value - weight).abs() <= slack * step).all())


@pytest.mark.parametrize("bits", BITS)
def test_eight_times_the_bits_is_exact_on_grid_values(bits: int) -> None:
    format = WeightFormat(bits=bits)  # type: ignore[arg-type]
    weight = 0.5 * torch.arange(format.lowest, format.highest + 1).float().unsqueeze(0)
    grid = MeanSquare().fit(weight, format, torch.float32, None)
    exact = weight / 0.5 * float(grid.scale[0, 0])
    assert torch.equal(grid.round(exact).dequantize(), exact)


def test_no_search_chooses_worse_than_the_whole_range() -> None:
    weight = torch.randn(64, 64, generator=generator(0))
    for symmetric in (True, False):
        for bits in BITS:
            format = WeightFormat(bits=bits, group_size=32, symmetric=symmetric)  # type: ignore[arg-type]
            searched, whole = error(weight, MeanSquare(), format), error(weight, AbsoluteMaximum(), format)
            assert bool((searched <= whole * (1 + 1e-6)).all())


def test_the_search_finds_what_trying_everything_finds() -> None:
    weight = torch.randn(200, 64, generator=generator(1))
    format = WeightFormat(bits=3)
    search = MeanSquare(signed=False, candidates=41)
    whole = weight.abs().amax(1, keepdim=True) / 3.5
    every = [
        ((weight / (whole * factor)).round().clamp(-4, 3) * (whole * factor) - weight).square().sum(1)
        for factor in torch.linspace(0.5, 1, 41).tolist()
    ]
    best = torch.stack(every).amin(0)
    found = error(weight, search, format)
    assert bool((found >= best * (1 - 1e-5)).all())
    # Coarse to fine may end in the second best of two valleys.
    assert (found <= best * (1 + 1e-5)).float().mean() > 0.9
    assert found.sum() < 1.01 * best.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_coarse_to_fine_stays_near_the_best_of_all_trials(bits: Literal[2, 3, 4, 8], symmetric: bool) -> None:
    """The search as it is by default, against each of its candidates, on rows of groups of every kind of importance."""
    format, search = WeightFormat(bits=bits, group_size=32, symmetric=symmetric), MeanSquare()
    for kind in KINDS:
        layer = Layer(kind, bits=None, tokens=512)
        importance = layer.statistics.mean_gram().diagonal().float()
        grid = AbsoluteMaximum().fit(layer.weight, format, torch.float32, None)
        groups, counted = layer.weight.unflatten(1, (3, 32)).double(), importance.view(3, 32).double()
        low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True).clamp_min(0)
        errors = []
        for factor in (1 - 0.5 * torch.arange(20) / 19).tolist():
            for sign in (1, -1) if symmetric else (1,):
                scale = grid.scale.double().unsqueeze(2) * factor * sign
                zero = 0 if symmetric else (format.lowest - low / ((high - low) / (2**bits - 1))).round()
                codes = (groups / scale).round().add(zero).clamp(format.lowest, format.highest)
                errors.append((((codes - zero) * scale - groups).square() * counted).sum(2))
        found = error(layer.weight, search, format, importance).double().sum()
        few_count = kind == "outlier channels"
        assert found <= (1.15 if few_count else 1.02) * torch.stack(errors).amin(0).sum(), kind


def test_rounding_of_the_scale_comes_before_the_codes() -> None:
    weight = torch.randn(64, 64, generator=generator(2))
    for symmetric in (True, False):
        grid = MeanSquare().fit(weight, WeightFormat(bits=8, symmetric=symmetric), torch.bfloat16, None)
        solved = grid.round(weight)
        zero = 0 if solved.zero_point is None else solved.zero_point.float()
        steps = (weight / solved.scale.float() + zero).clamp(-128, 127)
        assert bool(((solved.codes.float() - steps).abs() <= 0.5001).all())


def test_more_candidates_find_better_scales() -> None:
    weight = torch.randn(256, 64, generator=generator(3))
    few, many = (error(weight, MeanSquare(candidates=count), WeightFormat(bits=3)).sum() for count in (3, 40))
    assert many < 0.99 * few


def test_shrink_bounds_the_range_that_is_given_up() -> None:
    weight = torch.randn(256, 128, generator=generator(4))
    whole = AbsoluteMaximum().fit(weight, WeightFormat(bits=2), torch.float32, None).scale
    for shrink in (0.2, 0.7):
        scale = MeanSquare(shrink=shrink).fit(weight, WeightFormat(bits=2), torch.float32, None).scale
        ratio = (scale / whole).abs()
        assert ratio.min() == pytest.approx(1 - shrink, abs=0.15)
        assert ratio.min() >= 1 - shrink - 1e-6


def test_a_higher_norm_clips_less() -> None:
    weight = torch.randn(256, 128, generator=generator(5))
    scales = [
        MeanSquare(norm=norm).fit(weight, WeightFormat(bits=3), torch.float32, None).scale.abs().mean()
        for norm in (1.0, 2.0, 4.0)
    ]
    assert scales[0] < scales[1] < scales[2]


def test_importance_lowers_the_weighted_error() -> None:
    weight = torch.randn(256, 64, generator=generator(6))
    importance = torch.logspace(-2, 2, 64)
    format = WeightFormat(bits=3, group_size=32)
    weighted = error(weight, MeanSquare(), format)
    assert torch.equal(weighted, error(weight, MeanSquare(weighted=False), format))
    grids = [MeanSquare(weighted=value).fit(weight, format, torch.float32, importance) for value in (True, False)]
    losses = [((grid.round(weight).dequantize() - weight).square() @ importance).sum() for grid in grids]
    assert losses[0] < 0.97 * losses[1]


def test_importance_in_any_unit() -> None:
    weight = torch.randn(16, 64, generator=generator(7))
    importance = torch.logspace(-2, 2, 64)
    scales = [
        MeanSquare().fit(weight, WeightFormat(), torch.float32, importance * unit).scale for unit in (1e-34, 1.0, 1e34)
    ]
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[2], scales[1])


def test_signed_scales_give_the_extra_step_to_the_longer_tail() -> None:
    weight = torch.randn(128, 64, generator=generator(8))
    weight[:, 0] = 5
    format = WeightFormat(bits=3)
    signed, unsigned = (MeanSquare(signed=value).fit(weight, format, torch.float32, None) for value in (True, False))
    assert bool((unsigned.scale > 0).all())
    assert (signed.scale < 0).float().mean() > 0.9
    losses = [(grid.round(weight).dequantize() - weight).square().sum() for grid in (signed, unsigned)]
    assert losses[0] < 0.95 * losses[1]


def test_signed_scales_are_for_symmetric_grids_only() -> None:
    weight = torch.randn(64, 64, generator=generator(9))
    format = WeightFormat(bits=3, symmetric=False)
    grids = [MeanSquare(signed=value).fit(weight, format, torch.float32, None) for value in (True, False)]
    assert torch.equal(grids[0].scale, grids[1].scale)


def test_asymmetric_grids_follow_a_shift() -> None:
    weight = torch.randn(64, 64, generator=generator(10)) + 3
    losses = [error(weight, AbsoluteMaximum(), WeightFormat(symmetric=value)).sum() for value in (True, False)]
    assert losses[1] < 0.7 * losses[0]


def test_smaller_groups_fit_better() -> None:
    weight = torch.randn(32, 128, generator=generator(11)) * torch.logspace(-1, 1, 128)
    losses = [error(weight, AbsoluteMaximum(), WeightFormat(group_size=size)).sum() for size in (32, 64, None)]
    assert losses[0] < losses[1] < losses[2]


def test_large_weights_are_searched_in_parts() -> None:
    weight = torch.randn(700, 256, generator=generator(12))
    together = MeanSquare().fit(weight, WeightFormat(), torch.float32, None).scale
    alone = MeanSquare().fit(weight[600:601], WeightFormat(), torch.float32, None).scale
    assert torch.equal(together[600:601], alone)


def test_groups_must_tile_the_input() -> None:
    with pytest.raises(ValueError, match="96 input columns: expected a multiple of group_size 64"):
        RTN().quantize(torch.ones(2, 96), None, WeightFormat(group_size=64), scale_dtype=torch.float32)


def test_a_scale_must_fit_its_dtype() -> None:
    with pytest.raises(ValueError, match=r"exceeds the range of torch\.float16"):
        RTN().quantize(torch.full((1, 32), 1e7), None, WeightFormat(), scale_dtype=torch.float16)


def test_weights_too_small_for_the_dtype_of_the_scale() -> None:
    weight = torch.full((1, 32), 1e-12)
    solved = RTN().quantize(weight, None, WeightFormat(), scale_dtype=torch.float16).weight
    assert not solved.dequantize().any()
    assert solved.scale.item() == pytest.approx(torch.finfo(torch.float16).tiny)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.tensor([[1.0, torch.nan]]), "weight: holds NaN"),
        (torch.tensor([[1.0, -torch.inf]]), "weight: holds NaN or infinity"),
        (torch.ones(3), r"weight: float32 \[3\]"),
        (torch.ones(0, 3), r"weight: float32 \[0, 3\]"),
        (torch.ones(3, 3, dtype=torch.int32), "weight: int32"),
    ],
)
def test_weights_that_are_refused(weight: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RTN().quantize(weight, None, WeightFormat(), scale_dtype=torch.float32)


def test_rtn_rounds_each_weight_to_its_nearest_value() -> None:
    weight = torch.randn(9, 64, generator=generator(13))
    solved = RTN().quantize(weight, None, WeightFormat(bits=3, group_size=32), scale_dtype=torch.float32).weight
    values = torch.arange(-4, 4).view(1, 1, -1) * solved.scale.repeat_interleave(32, 1).unsqueeze(-1)
    nearest = (values - weight.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((solved.dequantize() - weight).abs(), nearest)


def test_rtn_weighs_columns_by_the_power_of_their_input() -> None:
    weight, statistics = layer(rows=64, columns=64)
    format, search = WeightFormat(bits=3), MeanSquare()
    solved = RTN(scale=search).quantize(weight, statistics, format, scale_dtype=torch.float32)
    expected = search.fit(weight, format, torch.float32, statistics.mean_gram().diagonal().float())
    assert torch.equal(solved.weight.scale, expected.scale)
    assert not torch.equal(expected.scale, search.fit(weight, format, torch.float32, None).scale)
    assert not solved.fallbacks


def test_rtn_without_tokens_searches_unweighted_and_says_so() -> None:
    weight, _ = layer(rows=8, columns=64)
    result = RTN(scale=MeanSquare()).quantize(weight, of(torch.zeros(0, 64)), WeightFormat(), scale_dtype=torch.float32)
    assert [fallback.step for fallback in result.fallbacks] == ["rtn.scale"]
    alike = RTN(scale=MeanSquare(weighted=False)).quantize(weight, None, WeightFormat(), scale_dtype=torch.float32)
    assert torch.equal(result.weight.codes, alike.weight.codes)


def test_a_weighted_search_needs_statistics() -> None:
    with pytest.raises(ValueError, match="statistics: none"):
        RTN(scale=MeanSquare()).quantize(torch.ones(2, 32), None, WeightFormat(), scale_dtype=torch.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 5},
        {"bits": "4"},
        {"group_size": 0},
        {"group_size": 33},
        {"group_size": -32},
        {"group_size": True},
        {"width": 4},
    ],
)
def test_formats_that_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        WeightFormat.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "awq"},
        {"kind": "gptq", "damping": 0},
        {"kind": "gptq", "damping": float("nan")},
        {"kind": "gptq", "block_size": 0},
        {"kind": "gptq", "refinement": -1},
        {"kind": "rtn", "act_order": True},
        {"kind": "gptq", "scale": {"kind": "mse", "shrink": 1}},
        {"kind": "gptq", "scale": {"kind": "mse", "candidates": 1}},
        {"kind": "gptq", "scale": {"kind": "absmax", "norm": 2}},
    ],
)
def test_quantizers_that_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AnyQuantizer).validate_python(fields)


def test_a_manifest_names_a_quantizer() -> None:
    named = TypeAdapter(AnyQuantizer).validate_python(
        {"kind": "gptq", "act_order": False, "scale": {"kind": "mse", "norm": 2.4, "signed": False}}
    )
    assert named.model_dump()["scale"]["norm"] == 2.4
    assert not named.act_order
