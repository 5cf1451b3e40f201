"""Ranks: what each way of asking resolves to, and what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from counterweight.workers.methods.compensations.rank import AnyRank, CountRank, EnergyRank, FractionRank

NONE = torch.zeros(0)


@pytest.mark.parametrize(
    ("fraction", "rows", "columns", "rank"),
    [(0.1, 256, 768, 26), (0.1, 768, 256, 26), (0.1, 128, 256, 13), (0.001, 64, 64, 1), (1.0, 64, 96, 64)],
)
def test_a_fraction_of_the_smaller_side(fraction: float, rows: int, columns: int, rank: int) -> None:
    assert FractionRank(fraction=fraction).resolve(rows, columns, NONE) == rank


def test_a_count_is_that_count_where_it_fits() -> None:
    assert CountRank(count=64).resolve(64, 96, NONE) == 64
    assert CountRank(count=64).problem(64, 96) is None


@pytest.mark.parametrize(("rows", "columns"), [(63, 96), (96, 63)])
def test_a_count_beyond_the_layer_is_an_error(rows: int, columns: int) -> None:
    assert CountRank(count=64).problem(rows, columns) == "rank.count: 64: expected at most 63"
    with pytest.raises(ValueError, match=r"rank\.count: 64: expected at most 63"):
        CountRank(count=64).resolve(rows, columns, NONE)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.39, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.9, 3), (0.95, 4), (1.0, 4)]
)
def test_energy_counts_singular_values_not_squares(energy: float, rank: int) -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert EnergyRank(energy=energy).resolve(4, 9, values) == rank


def test_all_the_energy_of_a_singular_residual_needs_no_null_directions() -> None:
    values = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert EnergyRank(energy=1.0).resolve(4, 4, values) == 2


@pytest.mark.parametrize("rank", [FractionRank(fraction=0.5), EnergyRank(energy=0.5)])
def test_shares_fit_every_layer(rank: FractionRank | EnergyRank) -> None:
    assert rank.problem(1, 1) is None
    assert rank.resolve(1, 1, torch.ones(1)) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"count": 0},
        {"count": 1.5},
        {"count": "8"},
        {"count": True},
        {"fraction": 0},
        {"fraction": 1.1},
        {"fraction": float("nan")},
        {"energy": 0},
        {"energy": 2},
        {"count": 8, "fraction": 0.1},
        {"budget": 3},
    ],
)
def test_ranks_that_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AnyRank).validate_python(fields)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"count": 8}, CountRank(count=8)),
        ({"fraction": 1}, FractionRank(fraction=1.0)),
        ({"energy": 0.5}, EnergyRank(energy=0.5)),
    ],
)
def test_a_manifest_names_a_rank(fields: dict[str, object], rank: object) -> None:
    assert TypeAdapter(AnyRank).validate_python(fields) == rank
