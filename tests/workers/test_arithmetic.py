"""A solve with its errors, and the gains of a branch: what is planned is what torch executes, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from counterweight.workers.arithmetic.solving import gains as gains_work
from counterweight.workers.arithmetic.solving import solve as solve_work
from counterweight.workers.calibration.clipping import activation_format
from counterweight.workers.calibration.statistics import Accumulator, Gathering, InputStatistics, ShardMoments
from counterweight.workers.matrix_flops import cholesky
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.solve import LayerState, gains, solve
from tests.flop_counter import counted, deviations

GPTQ: Mapping[str, Any] = {"weights": {"bits": 4, "group_size": 128}}
RTN: Mapping[str, Any] = {"weights": {**GPTQ["weights"], "quantizer": {"kind": "rtn"}}}
LRC: Mapping[str, Any] = {**GPTQ, "activations": {"bits": 4}, "compensation": {"kind": "lrc"}}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "RTN": RTN,
    "GPTQ": GPTQ,
    "GPTQ, quantized input": {**GPTQ, "activations": {"bits": 8}},
    "sign": {"weights": {"format": "sign"}},
    "regressed": {
        "weights": {**GPTQ["weights"], "quantizer": {"kind": "gptq", "target": "regressed"}},
        "activations": {"bits": 4},
    },
    "SVD": {**RTN, "compensation": {"kind": "svd"}},
    "SVD, anticipated": {**GPTQ, "compensation": {"kind": "svd", "anticipation": 1.0}},
    "ASER": {**RTN, "compensation": {"kind": "aser", "rank": {"count": 8}, "outliers": 4}},
    "LRC": LRC,
    "residual store": {**RTN, "residual": {}},
    "residual store behind a branch": {**GPTQ, "residual": {}, "compensation": {"kind": "svd"}},
}


def layers_of(part: ModuleRecipe, rows: tuple[int, ...], columns: int, tokens: int, original: bool) -> list[LayerState]:
    generator = torch.Generator().manual_seed(0)
    gathering = Gathering(
        activations=None if part.activations is None else activation_format(part.activations),
        absolute=part.compensation.needs_magnitudes,
        thresholds=part.residual is not None,
    )
    x, noise = (torch.randn(tokens, columns, generator=generator) for _ in range(2))
    accumulator = Accumulator(columns, "cpu", gathering)
    accumulator.add(ShardMoments.of(x, gathering, x + 0.1 * noise if original else None))
    statistics: InputStatistics = accumulator.result()
    return [
        LayerState(
            weight=torch.randn(count, columns, generator=generator) / columns**0.5,
            statistics=statistics,
            scale_dtype=torch.float16,
            factor_dtype=torch.bfloat16,
        )
        for count in rows
    ]


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "recipe", [RTN, {**GPTQ, "activations": {"bits": 8}}, LRC], ids=["RTN", "quantized input", "LRC"]
)
def test_errors_from_second_moments_are_those_of_the_rows(recipe: Mapping[str, Any], original: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(300, 128, generator=generator) for _ in range(2))
    part = part_of(recipe)
    for layer in solve(part, layers_of(part, (32,), 128, 300, original)):
        found = layer.errors_on(x, x + 0.1 * noise if original else None)
        assert layer.errors() == pytest.approx(found, rel=1e-3)
        assert 0 < found[1] <= found[0] < 1


def part_of(recipe: Mapping[str, Any]) -> ModuleRecipe:
    return ModuleRecipe.model_validate({"activations": None, "compensation": {"kind": "none"}, **recipe})


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [((128, 128), 256, 600), ((384,), 128, 64), ((96,), 512, 2000)])
@pytest.mark.parametrize("original", [False, True])
def test_a_solve(name: str, rows: tuple[int, ...], columns: int, tokens: int, original: bool) -> None:
    part = part_of(RECIPES[name])
    layers = layers_of(part, rows, columns, tokens, original)
    streams = 1 + (part.activations is not None) + original
    shapes = [(count, columns) for count in rows]
    executed = counted(lambda: [layer.errors() for layer in solve(part, layers)])
    planned = solve_work(part, shapes, tokens, streams=streams, original=original)
    assert deviations(planned, executed, exact=0.01, entries=0.15) == {}


def test_linears_that_are_solved_together_share_a_factorization() -> None:
    part = part_of(GPTQ)
    both = solve_work(part, [(128, 256), (64, 256)], 600, streams=1, original=False)
    each = [solve_work(part, [(rows, 256)], 600, streams=1, original=False) for rows in (128, 64)]
    assert both.factorizations == cholesky(256).factorizations
    assert sum(work.factorizations for work in each) == 2 * both.factorizations
    assert sum(work.products32 for work in each) == pytest.approx(both.products32)


def test_codes_that_were_trained_are_not_chosen_again() -> None:
    part = part_of({**RTN, "compensation": {"kind": "svd"}, "tuning": {"kind": "lsi"}})
    chosen = solve_work(part_of({**RTN, "compensation": {"kind": "svd"}}), [(96, 256)], 600, streams=1, original=False)
    layers = layers_of(part, (96,), 256, 600, False)
    coded = solve(part_of(RTN), layers)
    executed = counted(lambda: [layer.errors() for layer in solve(part, coded)])
    planned = solve_work(part, [(96, 256)], 600, streams=1, original=False)
    assert deviations(planned, executed, exact=0.01, entries=0.15) == {}
    assert planned.elementwise < chosen.elementwise


@pytest.mark.parametrize("tokens", [100, 800])
@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (384, 128)])
@pytest.mark.parametrize("name", ["SVD", "LRC"])
def test_gains_of_a_branch(name: str, rows: int, columns: int, tokens: int) -> None:
    recipe = RECIPES[name]
    part = part_of({**recipe, "compensation": {**recipe["compensation"], "rank": {"budget_bits": 1.0}}})
    layers = layers_of(part, (rows,), columns, tokens, False)
    executed = counted(lambda: gains(part, layers))
    assert deviations(gains_work(part, rows, columns, tokens), executed, exact=0.01, entries=0.15) == {}
