"""ASER on many kinds of input and ranks: what it takes out of the codes comes back, so that it never hurts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.kernels.reference import quantize_activations
from counterweight.workers.methods.compensations import ASER, NoCompensation
from counterweight.workers.methods.compensations.rank import CountRank, EnergyRank, FractionRank, Rank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.methods.weights import Weights
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.solve import LayerState, solve
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.workers.kinds import KINDS, Layer

RANKS: list[Rank] = [
    *(CountRank(count=count) for count in (1, 2, 5, 64)),
    *(FractionRank(fraction=fraction) for fraction in (0.01, 0.1, 1.0)),
    *(EnergyRank(energy=energy) for energy in (0.01, 0.05, 0.2, 0.5, 1.0)),
]


def solved(layer: Layer, aser: ASER | None) -> LayerState:
    """The layer, rounded to nearest, with ASER's branch or without one; inputs are not scaled."""
    recipe = ModuleRecipe(
        weights=Weights(bits=4, quantizer=RTN()), activations=None, compensation=aser or NoCompensation()
    )
    outliers: Tensor | None = None
    if aser is not None:
        taken = aser.take_out([layer.weight], layer.seen.abs().double().mean(0), len(layer.weight))
        outliers = None if taken is None else taken.channels
    state = LayerState(
        weight=layer.weight,
        statistics=layer.statistics,
        scale_dtype=torch.float32,
        factor_dtype=torch.float32,
        outliers=outliers,
    )
    return solve(recipe, [state])[0]


def error(state: LayerState) -> float:
    found = state.errors()[1]
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_of_any_rank_is_at_least_as_good_as_none(kind: str) -> None:
    layer = Layer(kind, bits=8, rows=64, tokens=512)
    plain = error(solved(layer, None))
    for rank in RANKS:
        assert error(solved(layer, ASER(rank=rank, smoothing=False))) <= plain, rank


def test_a_rank_by_energy_is_beside_the_columns_that_come_back() -> None:
    layer = Layer("outlier channels", bits=8)
    gram = layer.statistics.mean_gram()
    for outliers in (3, 20):
        for energy in (0.1, 0.5, 1.0):
            found = solved(layer, ASER(rank=EnergyRank(energy=energy), outliers=outliers, smoothing=False))
            assert found.branch is not None
            assert found.outliers is not None
            rounding = (layer.weight - found.stored.dequantize()).double()
            rounding[:, found.outliers] = 0
            values = torch.linalg.svdvals(rounding @ torch.linalg.cholesky(gram))
            expected = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
            assert found.branch.rank == min(expected + outliers, 96)


SIBLINGS: dict[str, Any] = {
    "one of small rank": {"kind": "aser", "rank": {"count": 4}},
    "one without a branch": {"kind": "none"},
    "one by energy": {"kind": "aser", "rank": {"energy": 0.05}},
    "one by its size": {"kind": "aser", "rank": {"fraction": 0.05}},
}


@pytest.mark.parametrize("smoothing", [False, True], ids=["as they are", "scaled"])
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_siblings_of_other_ranks_lose_nothing(sibling: str, smoothing: bool, tmp_path: Path) -> None:
    """Linears that share an input with others of their own rank, through a job, against rounding alone."""
    model = checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    with torch.no_grad():
        for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
            norm.weight[::9] *= 30  # channels that stand out
    model.save_pretrained(tmp_path / "model", safe_serialization=True)
    base = {"weights": {"bits": 4, "quantizer": {"kind": "rtn"}}, "activations": {"bits": 8}}
    aser = {"kind": "aser", "rank": {"count": 24}, "outliers": 8, "smoothing": smoothing}
    exceptions = [
        {"match": f"*.{name}", "compensation": {**SIBLINGS[sibling]}} for name in ("q_proj", "k_proj", "gate_proj")
    ]
    errors: dict[str, dict[str, float]] = {}
    for name, recipe in (("plain", base), ("mixed", {**base, "compensation": aser, "overrides": exceptions})):
        published = run_job(tmp_path / "model", tmp_path / name, recipe)
        report = json.loads((local(published) / "report" / "report.json").read_text())
        errors[name] = {module["name"]: module["held_out"]["compensated"] for module in report["modules"]}
    for module, plain in errors["plain"].items():
        assert errors["mixed"][module] <= 1.02 * plain, module


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_small_weights_errs_as_much_as_one_of_large_ones(kind: str) -> None:
    """Why outliers are chosen by activations: with one scale per row, a column's share of the error is that of its E[x^2]."""
    layer = Layer(kind, bits=None, rows=1024, tokens=256)
    weight = layer.weight * torch.logspace(-1, 0, 96)
    codes = RTN().quantize(weight, None, WeightFormat(bits=8), scale_dtype=torch.float32).weight.dequantize()
    power = layer.statistics.mean_gram().diagonal()
    shares = (weight - codes).double().square().mean(0) * power
    alive = power > 0
    relative = (shares / shares.sum())[alive] / (power / power.sum())[alive]
    assert float(relative.min()) > 0.8
    assert float(relative.max()) < 1.25


def test_scaled_outliers_leave_finer_steps_to_all_other_channels() -> None:
    layer = Layer("outlier channels", bits=8)
    magnitude = layer.seen.abs().double().mean(0)
    taken = ASER(rank=CountRank(count=20), outliers=4).take_out([layer.weight], magnitude, 96)
    assert taken is not None
    assert taken.scales is not None
    before, after = (quantize_activations(x, 8)[1] for x in (layer.seen, layer.seen / taken.scales.float()))
    assert bool((after <= before).all())
    assert float((after / before).median()) < 0.2
