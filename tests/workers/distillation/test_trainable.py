"""A linear in training against the one that is served."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterweight.kernels.formats import LowRank
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.workers.block import CompressedLinear
from counterweight.workers.distillation.trainable import TrainableLinear
from tests.workers.distillation.students import RANK, compressed

WEIGHT = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
X = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))
BIAS = torch.linspace(-1, 1, 24)
TRANSFORM = Hadamard(size=32, seed=None)


def served(linear: CompressedLinear) -> CompensatedLinear:
    return CompensatedLinear(
        linear.weight,
        low_rank=linear.low_rank,
        bias=BIAS,
        activations=linear.activations,
        transform=linear.transform,
    )


def branch_of(linear: CompressedLinear) -> LowRank:
    assert linear.low_rank is not None
    return linear.low_rank


def changed(factor_bits: int | None = None) -> TrainableLinear:
    """A linear whose parameters are not those that it began with."""
    found = TrainableLinear(compressed(WEIGHT, factor_bits=factor_bits), None, torch.float32)
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.02 * noise)
    return found


@pytest.mark.parametrize("factor_bits", [None, 8])
@pytest.mark.parametrize("transform", [None, TRANSFORM])
def test_computes_what_is_served(factor_bits: int | None, transform: Hadamard | None) -> None:
    linear = replace(compressed(WEIGHT, factor_bits=factor_bits), transform=transform)
    found = TrainableLinear(linear, BIAS, torch.float32)
    torch.testing.assert_close(found(X), served(linear)(X), rtol=1e-6, atol=1e-6)


def test_without_activations_and_branch_too() -> None:
    linear = replace(compressed(WEIGHT), activations=None, low_rank=None)
    found = TrainableLinear(linear, BIAS, torch.float32)
    torch.testing.assert_close(found(X), served(linear)(X), rtol=1e-6, atol=1e-6)
    assert [name for name, _ in found.named_parameters()] == ["gain"]
    assert found.stored().low_rank is None


def test_gradients_are_those_of_unrounded_inputs() -> None:
    linear = replace(compressed(WEIGHT.double()), transform=TRANSFORM)
    found = TrainableLinear(linear, None, torch.float64)
    x = X.double().requires_grad_()
    weights = torch.randn(5, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found(x) * weights).sum().backward()

    up, down = branch_of(linear).factors(torch.float64)
    codes = linear.weight.dequantize(torch.float64)
    turned = TRANSFORM.apply(X.double()).flatten(0, 1)
    assert linear.activations is not None
    rounded = fake_quantize_activations(turned, linear.activations)
    outward = weights.flatten(0, 1)
    gradients = {name: parameter.grad for name, parameter in found.named_parameters()}
    torch.testing.assert_close(gradients["up"], outward.T @ turned @ down.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients["down"], up.T @ outward.T @ turned, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients["gain"], (outward * (rounded @ codes.T)).sum(0), rtol=1e-9, atol=1e-9)
    inward = (outward @ (codes + up @ down)) @ TRANSFORM.dense().T
    torch.testing.assert_close(x.grad, inward.view_as(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor_bits", [None, 8])
def test_untrained_it_is_stored_as_it_began(factor_bits: int | None) -> None:
    linear = compressed(WEIGHT, factor_bits=factor_bits)
    found = TrainableLinear(linear, None, torch.float32).stored()
    first, branch = branch_of(linear), branch_of(found)
    assert branch.rank == RANK
    for own, other in [(branch.up, first.up), (branch.down, first.down)]:
        assert own.dtype == other.dtype
        assert torch.equal(own, other)
    assert (branch.up_scale is None) == (factor_bits is None)
    assert all(torch.equal(part, linear.weight.parts[name]) for name, part in found.weight.parts.items())


@pytest.mark.parametrize("factor_bits", [None, 8])
def test_rounded_it_computes_what_is_stored(factor_bits: int | None) -> None:
    found = changed(factor_bits)
    before, linear = found(X).detach(), found.stored()
    found.round()
    after = found(X).detach()
    expected = CompensatedLinear(linear.weight, low_rank=linear.low_rank, activations=linear.activations)(X)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(before, after) or factor_bits is None


def test_gains_are_taken_in_by_the_scales_and_given_back() -> None:
    found = changed()
    gain = found.gain.detach().clone()
    first, scaled = compressed(WEIGHT).weight.dequantize(), found.stored().weight.dequantize()
    torch.testing.assert_close(scaled, first * gain.unsqueeze(1), rtol=1e-6, atol=1e-6)
    found.round()
    assert torch.equal(found.gain, torch.ones(24))
    found.unround()
    torch.testing.assert_close(found.stored().weight.dequantize(), first)
