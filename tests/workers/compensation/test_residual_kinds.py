"""Residual stores on many kinds of input, against brute force: scales in float64, and all channels against W' + R."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.methods.residual import Residual
from tests.workers.kinds import KINDS, Layer

SELECTIONS = ("chunked", "bucketed", "exact", "static")


def quantized(layer: Layer) -> tuple[StoredWeight, Tensor]:
    """Codes of 3 bits that follow the input, and what they leave, [out, in]."""
    stored = GPTQ().quantize(layer.weight, layer.statistics, WeightFormat(bits=3), scale_dtype=torch.float32).weight
    return stored, layer.weight - stored.dequantize()


@pytest.mark.parametrize("candidates", [1, 7, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_that_is_tried_is_better(kind: str, candidates: int) -> None:
    layer = Layer(kind, bits=None, rows=40, tokens=512)
    _, residual = quantized(layer)
    made = Residual(candidates=candidates).store(residual, layer.statistics)
    assert made is not None
    rows = residual.double()
    steps = rows.abs().amax(1) / 7 * (torch.arange(1, candidates + 1).double() / candidates).unsqueeze(1)
    tried = (rows / steps.unsqueeze(2)).round().clamp(-7, 7) * steps.unsqueeze(2) - rows  # [candidates, out, in]
    best = tried.square().sum(2).amin(0)
    found = (made.store.dense().double() - rows).square().sum(1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_channels_a_layer_is_its_weight_and_its_residual(kind: str, selection: str) -> None:
    layer = Layer(kind, bits=None, rows=40, tokens=512)
    stored, residual = quantized(layer)
    options = Residual.model_validate({"channels_per_chunk": 1024, "selection": selection})
    correction = options.store(residual, layer.statistics)
    assert correction is not None
    served = CompensatedLinear(stored, residual=correction)(layer.unseen)
    expected = layer.unseen.double() @ (stored.dequantize() + correction.store.dense()).double().T
    torch.testing.assert_close(served.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
