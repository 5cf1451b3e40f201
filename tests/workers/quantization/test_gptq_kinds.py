"""GPTQ on many kinds of input: its codes against the paper's algorithm in a plain float64 loop, its descent pass by pass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from tests.workers.kinds import KINDS, Layer
from tests.workers.quantization.problems import row_losses

FORMATS = {
    "W2 g32": WeightFormat(bits=2, group_size=32),
    "W3 asymmetric": WeightFormat(bits=3, symmetric=False),
    "W4": WeightFormat(bits=4),
}
DAMPING = 0.01


def solved(layer: Layer, format: WeightFormat, **options: object) -> UniformWeight:
    quantizer = GPTQ.model_validate({"damping": DAMPING, **options})
    result = quantizer.quantize(layer.weight, layer.statistics, format, scale_dtype=torch.float32)
    assert isinstance(result.weight, UniformWeight)
    return result.weight


def damped(layer: Layer) -> Tensor:
    """E[x x^T] of the tokens, [in, in] float64, with a share of the median power of channels that had input."""
    inputs = layer.seen.double()
    hessian = inputs.T @ inputs / len(inputs)
    power = hessian.diagonal()
    return hessian + DAMPING * power[power > 0].median() * torch.eye(len(power), dtype=torch.float64)


def frantar(weight: Tensor, grid: UniformWeight, hessian: Tensor, order: list[int]) -> tuple[Tensor, Tensor]:
    """Codes [out, in] on the scales of `grid`, and what they were rounded from, both float64.

    Algorithm 1 of Frantar et al. (2022) without its blocks: Cholesky's factor U of the inverse Hessian, H^-1 = U^T U; column by
    column, what rounding leaves, divided by U_jj, is taken off the columns to come in the proportions of the row U_j.
    """
    half, width = 1 << (grid.bits - 1), grid.group_size or weight.shape[1]
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    work = weight.double()[:, order]
    codes, aims = torch.empty_like(work), torch.empty_like(work)
    for place, column in enumerate(order):
        scale = grid.scale[:, column // width].double()
        zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point[:, column // width].double()
        aims[:, column] = work[:, place] / scale + zero
        codes[:, column] = aims[:, column].round().clamp(-half, half - 1)
        left = (work[:, place] - (codes[:, column] - zero) * scale) / factor[place, place]
        work[:, place:] -= torch.outer(left, factor[place, place:])
    return codes, aims


@pytest.mark.parametrize("act_order", [True, False], ids=["act order", "as they come"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_papers_loop(kind: str, format: WeightFormat, act_order: bool) -> None:
    """But for ties: the first code of a row that differs, which moves those behind it, lay halfway between two."""
    layer = Layer(kind, bits=None, tokens=1024)
    found = solved(layer, format, act_order=act_order, refinement=0)
    power = layer.statistics.gram.diagonal()
    order = power.argsort(descending=True, stable=True).tolist() if act_order else list(range(len(power)))
    expected, aims = frantar(layer.weight, found, damped(layer), order)
    differ = (found.codes.double() != expected)[:, order]
    rows = differ.any(1).nonzero().flatten().tolist()
    assert len(rows) <= 0.05 * len(differ)
    for row in rows:
        first = order[int(differ[row].int().argmax())]
        assert abs(float(aims[row, first]) % 1 - 0.5) < 1e-3, (row, first)


@pytest.mark.parametrize("act_order", [True, False], ids=["act order", "as they come"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_never_rises_in_a_pass_of_refinement(kind: str, format: WeightFormat, act_order: bool) -> None:
    layer = Layer(kind, bits=None, rows=48, tokens=1024)
    metric = InputStatistics(gram=damped(layer), tokens=1)
    losses = [
        row_losses(layer.weight, solved(layer, format, act_order=act_order, refinement=passes), metric)
        for passes in range(5)
    ]
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert losses[1].sum() < losses[0].sum()
