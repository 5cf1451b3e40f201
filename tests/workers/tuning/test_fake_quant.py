"""Fake quantization against round to nearest, against finite differences, and against what the checkpoint will hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.quantization.rtn import rtn
from counterweight.workers.tuning.fake_quant import clipping_of, fake_quantize, straight_through

FORMATS = [
    WeightFormat(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group in (None, 32)
    for symmetric in (True, False)
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(rows: int = 12, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def clipped(weight: Tensor, format: WeightFormat, seed: int = 1) -> Tensor:
    """Clipping with another value for every bound of every group."""
    initial = clipping_of(weight, format)
    return initial + torch.randn(initial.shape, generator=torch.Generator().manual_seed(seed)) - 3.5


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_clipping_it_is_round_to_nearest(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = weight_of()
    (rounded,) = rtn(RTN(), weight.unsqueeze(0), [None], format, dtype)
    found, expected = fake_quantize(weight, format, dtype).stored(), rounded.weight
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert found.scale.dtype is dtype
    if expected.zero_point is None:
        assert found.zero_point is None
    else:
        assert found.zero_point is not None
        assert torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stored_weight_is_the_fake_quantized_one_to_the_bit(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = weight_of()
    fake = fake_quantize(weight, format, dtype, clipped(weight, format))
    stored = fake.stored()
    assert torch.equal(stored.dequantize(), fake.weight())
    assert (stored.bits, stored.group_size, stored.codes.dtype) == (format.bits, format.group_size, torch.int8)
    assert stored.codes.min() >= format.lowest
    assert stored.codes.max() <= format.highest
    assert (stored.zero_point is None) == format.symmetric


def test_clipping_starts_with_nearly_the_whole_range() -> None:
    weight = weight_of()
    for format in FORMATS:
        whole = fake_quantize(weight, format, torch.float32).scale
        start = fake_quantize(weight, format, torch.float32, clipping_of(weight, format)).scale
        torch.testing.assert_close(start / whole, torch.full_like(whole, 0.98201379))


@pytest.mark.parametrize("bound", [0, 1])
def test_each_bound_of_an_asymmetric_range_is_clipped_by_its_own_parameter(bound: int) -> None:
    format, weight = WeightFormat(bits=8, symmetric=False), weight_of()
    clipping = torch.full_like(clipping_of(weight, format), 30.0)
    clipping[bound] = 0.0  # half of it
    found = fake_quantize(weight, format, torch.float32, clipping)
    values, step = found.weight(), found.scale.squeeze(-1)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    expected = (low / 2, high) if bound == 0 else (low, high / 2)
    assert bool(((values.amin(1, keepdim=True) - expected[0]).abs() <= step).all())
    assert bool(((values.amax(1, keepdim=True) - expected[1]).abs() <= step).all())


def test_the_gradient_is_that_of_the_identity_within_the_range_and_zero_beyond() -> None:
    """Extreme entries set the range and gather more; entries beyond a clipped range gather nothing."""
    format, weight = WeightFormat(bits=4, symmetric=False), weight_of().requires_grad_()
    sent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    clipping = torch.zeros_like(clipping_of(weight, format))  # half the range: a good part is beyond
    found = fake_quantize(weight, format, torch.float32, clipping)
    (gradient,) = torch.autograd.grad((found.weight() * sent).sum(), weight)
    assert found.zero_point is not None
    unclamped = (weight / found.scale.squeeze(-1)).round() + found.zero_point.squeeze(-1)
    inside = (unclamped >= format.lowest) & (unclamped <= format.highest)
    extreme = (weight == weight.amin(1, keepdim=True)) | (weight == weight.amax(1, keepdim=True))
    assert 20 < int((~inside).sum()) < weight.numel() // 2
    torch.testing.assert_close(gradient[inside & ~extreme], sent[inside & ~extreme])
    assert not bool(gradient[~inside & ~extreme].any())


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_by_clipping_agree_with_finite_differences_of_the_fixed_codes(symmetric: bool) -> None:
    """Where no code flips, the weight is a smooth function of the scale; the straight-through part is known."""
    format, weight = WeightFormat(bits=3, symmetric=symmetric), weight_of()
    clipping = clipped(weight, format).requires_grad_()
    found = fake_quantize(weight, format, torch.float32, clipping)
    sent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((found.weight() * sent).sum(), clipping)
    # Independent: rounding stands for a constant added to what is rounded, so that all is smooth and float64.
    rows = weight.double()
    at = clipping.detach().double().squeeze(-1)

    def bounds(values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low * values[0].sigmoid(), high * values[-1].sigmoid()

    low, high = bounds(at)
    step = (high - low) / 7
    code_shift = (rows / step).round() - rows / step
    zero_shift = (-4 - low / step).round() - (-4 - low / step)
    first_zero = torch.zeros_like(low) if symmetric else (-4 - low / step).round()
    unclamped = (rows / step).round() + first_zero
    inside = (unclamped >= -4) & (unclamped <= 3)  # the last code itself is inside: it may still move

    def loss(values: Tensor) -> Tensor:
        low, high = bounds(values)
        step = (high - low) / 7
        zero = torch.zeros_like(low) if symmetric else -4 - low / step + zero_shift
        codes = torch.where(inside, rows / step + code_shift + zero, unclamped.clamp(-4, 3))
        return ((codes - zero) * step * sent.double()).sum()

    assert bool((~inside).any())
    for index in torch.cartesian_prod(torch.arange(at.shape[0]), torch.arange(at.shape[1])).tolist():
        nudge = torch.zeros_like(at)
        nudge[tuple(index)] = 1e-7
        expected = float(loss(at + nudge) - loss(at - nudge)) / 2e-7
        assert float(gradient[(*index, 0, 0)]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_straight_through_has_one_value_and_the_other_gradient() -> None:
    exact = torch.tensor([0.1, 1.7], requires_grad=True)
    rounded = torch.tensor([1e8, -3.0])
    result = straight_through(exact.square(), rounded)
    assert torch.equal(result, rounded)
    (gradient,) = torch.autograd.grad(result.sum(), exact)
    torch.testing.assert_close(gradient, 2 * exact)


def test_a_row_of_zeros_is_kept() -> None:
    weight = weight_of()
    weight[3] = 0
    for format in FORMATS:
        stored = fake_quantize(weight, format, torch.float16, clipping_of(weight, format)).stored()
        assert not bool(stored.dequantize()[3].any())
        assert bool((stored.scale != 0).all())


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    weight = weight_of() * 1e7
    with pytest.raises(ValueError, match=r"scale exceeds the range of torch\.float16"):
        fake_quantize(weight, WeightFormat(bits=2), torch.float16).stored()


def test_groups_that_do_not_tile_are_refused() -> None:
    weight, format = weight_of(columns=48), WeightFormat(group_size=32)
    for call in (lambda: clipping_of(weight, format), lambda: fake_quantize(weight, format, torch.float32)):
        with pytest.raises(ValueError, match="multiple of group_size 32"):
            call()
