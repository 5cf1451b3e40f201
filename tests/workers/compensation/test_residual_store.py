"""The residual store as it is made: scales against brute force, thresholds against sorting, every option, the error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from counterweight.kernels.residual import (
    Correction,
    ResidualStore,
    select_bucketed,
    select_chunked,
    select_exact,
    select_static,
)
from counterweight.workers.calibration.thresholds import Thresholds
from counterweight.workers.compensation.residual import residual_store
from counterweight.workers.methods.residual import Residual

ROWS, COLUMNS = 24, 256


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Gaussian rows of different size, some with a few large entries, which are worth clipping or not."""
    source = generator(0)
    matrix = torch.randn(rows, columns, generator=source) * torch.logspace(-4, 0, rows).unsqueeze(1)
    return torch.where(torch.rand(rows, columns, generator=source) < 0.01, 4 * matrix, matrix)


def tokens(count: int, seed: int, columns: int = COLUMNS) -> Tensor:
    """Outliers in other channels for each token."""
    return torch.randn(count, columns, generator=generator(seed)) ** 3


def thresholds(columns: int = COLUMNS) -> Tensor:
    seen = Thresholds(columns)
    seen.observe(tokens(200, 1, columns))
    return seen.result()


def store(options: Residual | None = None) -> ResidualStore:
    return residual_store(residual(), thresholds(), options or Residual())


def corrector(options: Residual, importance: Tensor | None = None) -> Correction:
    return Correction(
        store=store(options),
        selection=options.selection,
        channels_per_chunk=options.channels_per_chunk,
        importance=importance,
    )


def best_by_hand(row: list[float], candidates: int) -> tuple[float, float]:
    """Least squared error and its scale in float64, over linspace(smax / n, smax, n)."""
    widest = max(abs(value) for value in row) / 7
    tried: list[tuple[float, float]] = []
    for index in range(candidates):
        scale = widest / candidates + (widest - widest / candidates) * index / max(candidates - 1, 1)
        error = sum((max(-7, min(7, round(value / scale))) * scale - value) ** 2 for value in row)
        tried.append((error, scale))
    return min(tried)


def output_error(options: Residual, x: Tensor) -> float:
    """||R x - correction||^2 / ||R x||^2 in float64."""
    exact = x.double() @ residual().double().T
    importance = tokens(200, 1).square().mean(0)
    corrected = corrector(options, importance).apply(x).double()
    return ((exact - corrected).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("candidates", [5, 32])
def test_scales_are_the_best_of_the_grid(candidates: int) -> None:
    made = store(Residual(candidates=candidates))
    error = (made.dense().double() - residual().double()).square().sum(1)
    for row, values in enumerate(residual().double().tolist()):
        least, scale = best_by_hand(values, candidates)
        assert float(made.scale[row]) == pytest.approx(scale, rel=1e-5)
        assert float(error[row]) == pytest.approx(least, rel=1e-4)


def test_codes_are_the_nearest_on_their_scale() -> None:
    made = store()
    steps = (made.dense() / made.scale.unsqueeze(1)).round()
    assert torch.equal(steps, (residual() / made.scale.unsqueeze(1)).round().clamp(-7, 7))


def test_more_candidates_never_cost_anything_when_they_hold_the_others() -> None:
    def errors(candidates: int) -> Tensor:
        return (store(Residual(candidates=candidates)).dense() - residual()).square().sum(1)

    assert (errors(32) <= errors(1) * (1 + 1e-5)).all()
    assert errors(32).sum() < 0.9 * errors(1).sum()


def test_one_candidate_covers_the_whole_range() -> None:
    made = store(Residual(candidates=1))
    assert torch.equal(made.scale, residual().abs().amax(1) / 7)
    assert torch.all((made.dense() - residual()).abs() <= made.scale.unsqueeze(1) * 0.5001)


def test_a_row_of_zeros_stays_zero_and_harms_no_other() -> None:
    matrix = residual()
    matrix[3] = 0
    made = residual_store(matrix, thresholds(), Residual())
    assert made.scale[3] == 1
    assert torch.equal(made.dense()[3], torch.zeros(COLUMNS))
    assert torch.equal(made.dense()[4], store().dense()[4])


def test_the_smaller_of_two_equal_scales_is_taken() -> None:
    matrix = torch.zeros(1, 8)
    matrix[0, 0] = 1e-30  # squared errors vanish in float32: every candidate is equal
    made = residual_store(matrix, torch.ones(8), Residual(candidates=2))
    assert float(made.scale[0] / matrix[0, 0]) == pytest.approx(1 / 14, rel=1e-5)


def test_rows_are_independent_however_many_are_searched_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store()
    monkeypatch.setattr("counterweight.workers.compensation.residual._CHUNK_ELEMENTS", 3 * COLUMNS)
    assert torch.equal(store().dense(), whole.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_searched_as_they_are_stored(dtype: torch.dtype) -> None:
    made = residual_store(residual(), thresholds(), Residual(), scale_dtype=dtype)
    assert made.scale.dtype == dtype
    left = (made.dense() - residual()).square().sum(1)
    for share in torch.arange(1, 33) / 32:
        # The smallest rows need scales that are subnormal in float16.
        scale = (residual().abs().amax(1, keepdim=True) / 7 * share).to(dtype).float()
        rounded = (residual() / scale).round().clamp(-7, 7) * scale
        assert (left <= (rounded - residual()).square().sum(1) * (1 + 1e-5)).all()


def test_values_that_no_scale_can_hold_are_refused() -> None:
    matrix = residual()
    matrix[5] *= 1e30
    with pytest.raises(ValueError, match=r"residual: output channel 5: no scale in torch\.float16"):
        residual_store(matrix, thresholds(), Residual(), scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("matrix", "limits", "message"),
    [
        (torch.full((2, 4), torch.nan), torch.ones(4), "residual: holds NaN or infinity"),
        (torch.ones(4), torch.ones(4), "residual: float32 .*: expected a floating-point matrix"),
        (torch.ones(2, 4), torch.ones(5), r"thresholds: \[5\]: expected \[4\]"),
        (torch.ones(2, 4), torch.arange(4.0), "thresholds: expected finite magnitudes in descending order"),
        (torch.ones(2, 4), -torch.ones(4), "thresholds: expected finite magnitudes in descending order"),
        (torch.ones(2, 4), torch.full((4,), torch.inf), "thresholds: expected finite magnitudes in descending order"),
    ],
)
def test_what_cannot_be_stored_is_refused(matrix: Tensor, limits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_store(matrix, limits, Residual())


def test_thresholds_are_the_largest_magnitude_of_each_rank() -> None:
    x = tokens(7, 2, columns=9)
    seen = Thresholds(9)
    seen.observe(x)
    ranked = [sorted((abs(value) for value in token), reverse=True) for token in x.tolist()]
    assert seen.result().tolist() == [max(column) for column in zip(*ranked, strict=True)]


def test_thresholds_do_not_depend_on_the_split_of_the_tokens_or_its_order() -> None:
    x = tokens(60, 2)
    whole, first, second = Thresholds(COLUMNS), Thresholds(COLUMNS), Thresholds(COLUMNS)
    whole.observe(x.reshape(3, 20, COLUMNS))
    first.observe(x[50:])
    second.observe(x[:13])
    second.observe(x[13:50])
    second.observe(x[:0])
    first.merge(second.result())
    assert torch.equal(first.result(), whole.result())


def test_thresholds_without_tokens_are_zero_and_results_do_not_change_later() -> None:
    seen = Thresholds(4)
    before = seen.result()
    seen.observe(torch.ones(1, 4))
    assert torch.equal(before, torch.zeros(4))


def test_other_widths_and_values_that_are_not_finite_are_refused() -> None:
    seen = Thresholds(4)
    with pytest.raises(ValueError, match="rows: width 5: expected 4"):
        seen.observe(torch.ones(2, 5))
    with pytest.raises(ValueError, match="rows: hold NaN or infinity"):
        seen.observe(torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match="width 5 cannot join thresholds of width 4"):
        seen.merge(torch.ones(5))
    assert torch.equal(seen.result(), torch.zeros(4))


@pytest.mark.parametrize("selection", ["chunked", "bucketed", "exact", "static"])
def test_the_error_falls_as_more_channels_are_corrected(selection: str) -> None:
    x = tokens(100, 3)
    errors = [
        output_error(Residual.model_validate({"channels_per_chunk": k, "selection": selection}), x)
        for k in (16, 64, 256, 1024)
    ]
    assert all(more < less for less, more in pairwise(errors))


@pytest.mark.parametrize("selection", ["chunked", "bucketed", "exact", "static"])
def test_with_all_channels_what_is_left_is_the_residuals_own_quantization(selection: str) -> None:
    options = Residual.model_validate({"channels_per_chunk": 1024, "selection": selection})
    x = tokens(100, 3)
    exact, made = x.double() @ residual().double().T, store(options)
    left = x.double() @ (residual().double() - made.dense().double()).T
    assert output_error(options, x) == pytest.approx((left.square().sum() / exact.square().sum()).item(), rel=1e-3)


def test_each_selection_is_the_kernels() -> None:
    x, importance = tokens(20, 3), tokens(200, 1).square().mean(0)
    found = {
        kind: corrector(Residual.model_validate({"channels_per_chunk": 64, "selection": kind}), importance).select(x)
        for kind in ("chunked", "bucketed", "exact", "static")
    }
    assert torch.equal(found["chunked"], select_chunked(x, 64))
    assert torch.equal(found["bucketed"], select_bucketed(x, 64, thresholds()))
    assert torch.equal(found["exact"], select_exact(x, 16))
    assert torch.equal(found["static"], select_static(importance, 16))
    assert not torch.equal(found["bucketed"], found["exact"])


def test_choosing_for_each_token_beats_choosing_once() -> None:
    x = tokens(100, 3)
    static = output_error(Residual(channels_per_chunk=64, selection="static"), x)
    chunked = output_error(Residual(channels_per_chunk=64, selection="chunked"), x)
    exact = output_error(Residual(channels_per_chunk=64, selection="exact"), x)
    assert exact < 0.7 * static
    bucketed = output_error(Residual(channels_per_chunk=64, selection="bucketed"), x)
    assert exact <= chunked <= bucketed
    assert bucketed == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("columns", [8, 256, 1024, 1100, 2048, 11008])
@pytest.mark.parametrize("k_chunk", [1, 3, 100, 1024])
def test_the_recipe_counts_the_channels_that_are_selected(columns: int, k_chunk: int) -> None:
    options = Residual(channels_per_chunk=k_chunk)
    x = tokens(2, 4, columns)
    selected = select_bucketed(x, k_chunk, thresholds(columns))
    assert selected.sum(-1).tolist() == [options.channels(columns)] * 2
    made = residual_store(torch.ones(1, columns), thresholds(columns), options)
    exact = Correction(store=made, selection="exact", channels_per_chunk=options.channels_per_chunk).select(x)
    assert exact.sum(-1).tolist() == [options.channels(columns)] * 2


def test_only_decoded_tokens_are_corrected_when_they_are_named() -> None:
    options, x = Residual(channels_per_chunk=64), tokens(6, 5).reshape(2, 3, COLUMNS)
    decoded = torch.tensor([[False, False, True], [False, True, True]])
    everywhere, some = corrector(options).apply(x), corrector(options).apply(x, decoded=decoded)
    assert torch.equal(some, everywhere * decoded.unsqueeze(-1))
    static, importance = options.model_copy(update={"selection": "static"}), tokens(200, 1).square().mean(0)
    some = corrector(static, importance).apply(x, decoded=decoded)
    assert some[1, 2].any()
    assert not some[0, :2].any()


def test_a_static_selection_needs_importance() -> None:
    with pytest.raises(ValueError, match="importance: none"):
        corrector(Residual(selection="static"))


def test_half_precision_residuals_are_quantized_in_float32() -> None:
    matrix = residual().bfloat16()
    made = residual_store(matrix, thresholds(), Residual())
    assert torch.equal(made.dense(), residual_store(matrix.float(), thresholds(), Residual()).dense())


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"channels_per_chunk": 0},
        {"channels_per_chunk": 1025},
        {"selection": "random"},
        {"candidates": 0},
        {"kind": "x"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Residual.model_validate(options)
