"""Whitened SVD on many kinds of input against Eckart-Young: singular values of the tokens themselves, in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from counterweight.workers.methods.compensations import SVD
from counterweight.workers.methods.compensations.rank import CountRank, EnergyRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ, RTN
from tests.workers.kinds import KINDS, Layer

WHITENINGS = ("none", "magnitude", "diagonal", "full")
ROUNDING = 1e-6
"""Share of the residual that float32 moments may cost."""


def rounding_error(layer: Layer) -> Tensor:
    """What 3 bits leave of the weight, [out, in] float32."""
    codes = RTN().quantize(layer.weight, None, WeightFormat(bits=3), scale_dtype=torch.float32).weight
    return layer.weight - codes.dequantize()


def root_of_metric(layer: Layer, whitening: str) -> Tensor:
    """A [.., in] float64 with A^T A the metric, from the tokens: the error of a branch L is ||(E - L) A^T||^2."""
    inputs = layer.seen.double()
    if whitening == "full":
        return inputs / len(inputs) ** 0.5
    if whitening == "none":
        return torch.eye(inputs.shape[1], dtype=torch.float64)
    mean = inputs.abs().mean(0) if whitening == "magnitude" else inputs.square().mean(0).sqrt()
    # A channel that was always zero counts as little as any: nothing else would leave L2QER's scales invertible.
    return (mean.clamp_min(mean[mean > 0].min()) if whitening == "magnitude" else mean).diag()


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_leaves_what_eckart_and_young_leave(kind: str, whitening: str) -> None:
    layer = Layer(kind, bits=None, rows=64, tokens=1024)
    residual, root = rounding_error(layer), root_of_metric(layer, whitening)
    squares = torch.linalg.svdvals(residual.double() @ root.T).square()
    for rank in (1, 7, 40):
        options = SVD.model_validate({"whitening": whitening, "rank": {"count": rank}})
        branch = options.fit(residual, layer.statistics, dtype=torch.float64).low_rank
        assert branch is not None
        left = float(((residual.double() - branch.up @ branch.down) @ root.T).square().sum() / squares.sum())
        assert left == pytest.approx(float(squares[rank:].sum() / squares.sum()), abs=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_by_energy_is_that_of_the_spectrum(kind: str) -> None:
    layer = Layer(kind, bits=None, rows=64, tokens=1024)
    residual = rounding_error(layer)
    values = torch.linalg.svdvals(residual.double() @ root_of_metric(layer, "full").T)
    share = values.cumsum(0) / values.sum()
    for energy in (0.1, 0.5, 0.9):
        rank = SVD(rank=EnergyRank(energy=energy)).fit(residual, layer.statistics, dtype=torch.float32).rank
        assert share[rank - 1] >= energy - 1e-5
        assert rank == 1 or share[rank - 2] < energy + 1e-5


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_full_anticipation_wins_with_the_branch_and_loses_without_it(kind: str, bits: Literal[3, 4]) -> None:
    layer = Layer(kind, bits=None, tokens=2048)
    errors = []
    for share in (0.0, 1.0):
        options = SVD(rank=CountRank(count=10), anticipation=share)
        metric = options.foresee(layer.statistics, 96)
        codes = GPTQ().quantize(layer.weight, metric, WeightFormat(bits=bits), scale_dtype=torch.float32).weight
        branch = options.fit(layer.weight - codes.dequantize(), layer.statistics, dtype=torch.float32).low_rank
        assert branch is not None
        values = codes.dequantize()
        errors.append((layer.error(layer.seen, values, branch.product()), layer.error(layer.seen, values)))
    (with_plain, without_plain), (with_foreseen, without_foreseen) = errors
    assert with_foreseen < 0.95 * with_plain
    assert without_foreseen > 3 * without_plain
