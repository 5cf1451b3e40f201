"""The closed forms and the greedy loop over many kinds of input, each against something written independently, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.lrc import updated_branch
from counterweight.workers.methods.compensations import LRC, SVD
from counterweight.workers.methods.compensations.rank import CountRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from tests.workers.kinds import KINDS, Layer

FORMATS = {
    "W2 g32": WeightFormat(bits=2, group_size=32),
    "W3 asymmetric": WeightFormat(bits=3, symmetric=False),
    "W4": WeightFormat(bits=4),
}
SINGULAR = {"nearly low rank", "duplicated channels", "dead channels"}
"""Kinds whose Gram matrix has no inverse, or nearly none: minimizers are not unique, their errors are."""


def frantar(weight: Tensor, hessian: Tensor, solved: UniformWeight, order: Tensor) -> Tensor:
    """Codes [out, in] by the loop of the paper (Frantar et al. 2022, algorithm 1): columns in `order`, errors passed on through
    the upper Cholesky factor of the inverse Hessian. The grid is that of `solved`."""
    rows, columns = weight.shape
    groups = solved.scale.shape[1]
    scale = solved.scale.double().repeat_interleave(columns // groups, dim=1)
    zero = torch.zeros_like(scale)
    low, high = -(1 << (solved.bits - 1)), (1 << (solved.bits - 1)) - 1
    if solved.zero_point is not None:
        zero = solved.zero_point.double().repeat_interleave(columns // groups, dim=1)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, codes = weight.double()[:, order].clone(), torch.empty(rows, columns, dtype=torch.float64)
    for place, column in enumerate(order.tolist()):
        code = (left[:, place] / scale[:, column] + zero[:, column]).round().clamp(low, high)
        codes[:, column] = code
        error = left[:, place] - (code - zero[:, column]) * scale[:, column]
        left[:, place:] -= torch.outer(error / upper[place, place], upper[place, place:])
    return codes


@pytest.mark.parametrize("act_order", [True, False], ids=["by power", "in place"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_the_papers_loop(kind: str, format: str, act_order: bool) -> None:
    layer = Layer(kind, bits=None, rows=48, width=64, tokens=512)
    quantizer = GPTQ(act_order=act_order, refinement=0)
    found = quantizer.quantize(layer.weight, layer.statistics, FORMATS[format], scale_dtype=torch.float32).weight
    assert isinstance(found, UniformWeight)
    hessian = layer.statistics.mean_gram()
    power = hessian.diagonal().clone()
    hessian.diagonal().add_(0.01 * power[power > 0].median())
    order = power.argsort(descending=True, stable=True) if act_order else torch.arange(64)
    expected = frantar(layer.weight, hessian, found, order)
    # Behind a float32 target on the other side of a tie, a row goes another, equally good way.
    same = (found.codes.double() == expected).all(1).double().mean()
    assert same >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_never_raises_the_objective(kind: str) -> None:
    layer = Layer(kind, bits=None, rows=48, width=64, tokens=512)
    errors = []
    for passes in range(4):
        codes = GPTQ(refinement=passes).quantize(
            layer.weight, layer.statistics, WeightFormat(bits=3), scale_dtype=torch.float32
        )
        errors.append(layer.error(layer.seen, codes.weight.dequantize()))
    # What is minimized is damped; the plain error follows it to within the damping.
    assert all(after <= before * 1.01 for before, after in pairwise(errors))


@pytest.mark.parametrize("whitening", ["none", "magnitude", "diagonal", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_whitened_svd_reaches_eckart_and_young(kind: str, whitening: str) -> None:
    """The squared error in its own metric is the sum of the squared singular values that are given up."""
    layer = Layer(kind, bits=None, rows=40, width=64, tokens=512)
    magnitude = layer.seen.double().abs().sum(0)
    statistics = InputStatistics(gram=layer.statistics.gram, tokens=512, absolute=magnitude)
    residual = layer.weight - (layer.weight * 8).round() / 8
    options = SVD.model_validate({"rank": CountRank(count=7), "whitening": whitening})
    branch = options.fit(residual, statistics, dtype=torch.float64).low_rank
    assert branch is not None
    mean = magnitude / 512
    metric = {
        "none": torch.eye(64, dtype=torch.float64),
        "magnitude": torch.diag(mean.clamp_min(mean[mean > 0].min())),
        "diagonal": torch.diag(statistics.mean_gram().diagonal().sqrt()),
        "full": layer.seen.double().T / 512**0.5,
    }[whitening]
    exact = residual.double()
    values = torch.linalg.svdvals(exact @ metric)
    left = ((exact - branch.product(torch.float64)) @ metric).square().sum()
    assert float(left) == pytest.approx(float(values[7:].square().sum()), rel=1e-6, abs=1e-9 * float(values[0]) ** 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_update_lr_is_exact_regression_where_damping_is_nothing(kind: str, bits: int) -> None:
    """Full rank: what least squares over the tokens finds. In 7 ranks: the best approximation of its output."""
    layer = Layer(kind, bits=bits, rows=40, width=48, tokens=512)
    assert layer.activations is not None
    x, y = layer.seen.double(), fake_quantize_activations(layer.seen, layer.activations).double()
    codes = (layer.weight.double() * 8).round() / 8
    wanted = x @ layer.weight.double().T - y @ codes.T
    scale = float((x @ layer.weight.double().T).square().sum())
    projected = x @ torch.linalg.lstsq(x, wanted, driver="gelsd").solution
    least = float((wanted - projected).square().sum())
    values = torch.linalg.svdvals(projected)
    damping = 1e-6 if kind in SINGULAR else 1e-10
    for rank in (7, 40):
        branch = updated_branch(
            LRC(damping=damping), layer.weight.double(), codes, layer.statistics, rank, torch.float64
        )
        found = layer.error(layer.seen, codes, branch.product(torch.float64)) * scale
        expected = least + float(values[rank:].square().sum())
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-6 * scale)
