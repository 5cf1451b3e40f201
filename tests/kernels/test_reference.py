"""Dynamic quantization of activations: against compressed-tensors itself, and against the formula."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.reference import fake_quantize_activations, quantize_activations


def activations(dtype: torch.dtype) -> Tensor:
    """[2, 9, 16], with outliers, a token of zeros, and one whose largest value is negative."""
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] *= 30
    x[0, 4] = 0
    x[1, 2, 5] = -100
    return x.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_compressed_tensors_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    x = activations(dtype)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    expected = fake_quantize(x, scale, zero_point, args)
    assert torch.equal(quantize_activations(x, bits)[1], scale)
    assert torch.equal(fake_quantize_activations(x, ActivationFormat(bits=bits)), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_nearest_integers_of_the_range(bits: int) -> None:
    x = activations(torch.float32)
    codes, scale = quantize_activations(x, bits)
    top = 2 ** (bits - 1)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= -top
    assert codes.max() <= top - 1
    error = (codes * scale - x).abs()
    clipped = codes == top - 1  # half a step of the range lies above the largest code
    assert (error <= scale * torch.where(clipped, 1.0, 0.5) * (1 + 1e-5)).all()


def test_a_token_of_zeros_stays_zero() -> None:
    assert torch.equal(fake_quantize_activations(torch.zeros(1, 2, 8), ActivationFormat(bits=8)), torch.zeros(1, 2, 8))


def test_a_token_does_not_depend_on_the_others() -> None:
    x = activations(torch.float32)
    assert torch.equal(
        fake_quantize_activations(x, ActivationFormat(bits=8))[1, 2],
        fake_quantize_activations(x[1, 2], ActivationFormat(bits=8)),
    )
