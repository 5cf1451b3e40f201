"""The compensated layer against the sum written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.reference import fake_quantize_activations
from counterweight.kernels.weights.uniform import UniformWeight

OUT, IN = 6, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = UniformWeight(
    codes=(random(OUT, IN) * 3).round().clamp(-8, 7).to(torch.int8),
    scale=random(OUT, 2, seed=1).bfloat16(),
    zero_point=torch.full((OUT, 2), 2, dtype=torch.int8),
    bits=4,
    group_size=4,
)
BRANCH = LowRank(up=random(OUT, 3, seed=2).bfloat16(), down=random(3, IN, seed=3).bfloat16())
BIAS = random(OUT, seed=4)
X = random(2, 5, IN, seed=5)


A8 = ActivationFormat(bits=8)


@pytest.mark.parametrize("branch", [None, BRANCH])
@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize(
    "activations", [None, A8, ActivationFormat(bits=4, clip=0.8), ActivationFormat(bits=4, group_size=4)]
)
def test_is_the_sum_of_its_terms(
    branch: LowRank | None, bias: Tensor | None, activations: ActivationFormat | None
) -> None:
    layer = CompensatedLinear(WEIGHT, low_rank=branch, bias=bias, activations=activations)
    seen = X if activations is None else fake_quantize_activations(X, activations)
    expected = seen.double() @ WEIGHT.dequantize(torch.float64).T
    if branch is not None:
        # The branch sees the input before it is quantized.
        expected = expected + X.double() @ branch.down.double().T @ branch.up.double().T
    if bias is not None:
        expected = expected + bias.double()
    torch.testing.assert_close(layer(X), expected.float(), rtol=1e-5, atol=1e-5)


def test_every_term_has_a_say() -> None:
    full = CompensatedLinear(WEIGHT, low_rank=BRANCH, bias=BIAS, activations=A8)(X)
    for less in (
        CompensatedLinear(WEIGHT, bias=BIAS, activations=A8),
        CompensatedLinear(WEIGHT, low_rank=BRANCH, activations=A8),
        CompensatedLinear(WEIGHT, low_rank=BRANCH, bias=BIAS),
    ):
        assert (less(X) - full).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = CompensatedLinear(WEIGHT, low_rank=BRANCH, bias=BIAS, activations=A8)
    assert layer(X.to(dtype)).dtype is dtype


def test_the_weight_comes_back_as_a_value() -> None:
    layer = CompensatedLinear(WEIGHT)
    assert torch.equal(layer.weight.dequantize(), WEIGHT.dequantize())
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert "bits=4" in repr(layer)
    assert "rank=0" in repr(layer)


def test_buffers_follow_the_module_and_scales_keep_their_dtype() -> None:
    layer = CompensatedLinear(WEIGHT, low_rank=BRANCH).to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert layer.scale.dtype is torch.bfloat16
    assert layer.codes.dtype is torch.int8


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_decoded_token_gets_what_it_would_get_among_many(
    group_size: int | None, dtype: torch.dtype, tolerance: float, asymmetric: bool
) -> None:
    groups = 1 if group_size is None else 2
    weight = UniformWeight(
        codes=(random(40, 64) * 3).round().clamp(-8, 7).to(torch.int8),
        scale=random(40, groups, seed=9).abs() + 0.1,
        zero_point=torch.full((40, groups), 3, dtype=torch.int8) if asymmetric else None,
        bits=4,
        group_size=group_size,
    )
    layer = CompensatedLinear(weight, bias=random(40, seed=1))
    many = random(1, 16, 64, seed=5).to(dtype)
    together = layer(many)
    one_by_one = torch.cat([layer(token) for token in many.split(1, dim=1)], dim=1)
    assert one_by_one.dtype is dtype
    assert (one_by_one - together).norm() < tolerance * together.norm()
    assert "_by_group" in vars(layer.weight)


def test_a_few_tokens_have_gradients() -> None:
    """Of the input, as an expert that few tokens reach needs in training; and of a scale that is trained."""
    scale = (random(40, 1, seed=9).abs() + 0.1).requires_grad_()
    codes = (random(40, 64) * 3).round().clamp(-8, 7).to(torch.int8)
    weight = UniformWeight(codes=codes, scale=scale, zero_point=None, bits=4, group_size=None)
    token = random(1, 1, 64, seed=5).requires_grad_()
    weight.linear(token).sum().backward()
    dense = weight.dequantize().detach()
    assert token.grad is not None
    assert torch.allclose(token.grad, dense.sum(0), rtol=1e-4)
    weight.linear(token.detach()).sum().backward()
    assert scale.grad is not None
    assert torch.allclose(scale.grad, 2 * (codes.float() @ token.detach().flatten()).unsqueeze(1), rtol=1e-4)


@pytest.mark.parametrize("weight", [WEIGHT, replace(WEIGHT, zero_point=None)], ids=["zero points", "groups of 4"])
def test_what_cannot_be_multiplied_as_it_is_is_dequantized(weight: UniformWeight) -> None:
    layer = CompensatedLinear(weight)
    token = random(1, 1, IN, seed=5)
    assert torch.allclose(layer(token), token @ weight.dequantize().T, atol=1e-5)
    assert "_by_group" not in vars(layer.weight)


def test_a_batch_of_many_tokens_keeps_no_second_copy_of_the_codes() -> None:
    layer = CompensatedLinear(WEIGHT)
    layer(random(2, 8, IN))
    assert "_by_group" not in vars(layer.weight)
