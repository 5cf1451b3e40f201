"""What every stored format has to keep, for all of them; and the formulas of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import WeightForm
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.weights import StoredWeight, format_of, formats
from counterweight.kernels.weights.sign import SignWeight
from counterweight.kernels.weights.uniform import UniformWeight

OUT, IN = 40, 70


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(zero_point: bool) -> UniformWeight:
    return UniformWeight(
        codes=(random(OUT, IN) * 3).round().clamp(-8, 7).to(torch.int8),
        scale=random(OUT, 3, seed=1).abs().half() + 0.1,
        zero_point=(random(OUT, 3, seed=2) * 3).round().clamp(-8, 7).to(torch.int8) if zero_point else None,
        bits=4,
        group_size=32,
    )


def sign() -> SignWeight:
    return SignWeight.of(random(OUT, IN), random(OUT, seed=1).abs().half(), random(IN, seed=2).abs().half())


WEIGHTS: dict[str, Callable[[], StoredWeight]] = {
    "uniform, symmetric": lambda: uniform(False),
    "uniform, asymmetric": lambda: uniform(True),
    "sign": sign,
}


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> StoredWeight:
    return WEIGHTS[request.param]()


def equal(one: StoredWeight, other: StoredWeight) -> bool:
    return one.form == other.form and all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)


def test_every_format_is_tried_here() -> None:
    assert {make().kind for make in WEIGHTS.values()} == set(formats())


def test_what_is_stored_is_read_back(weight: StoredWeight) -> None:
    tensors = weight.tensors()
    assert tuple(tensors) == type(weight).names(weight.form)
    read = format_of(weight.kind).from_tensors(tensors, weight.form)
    assert read.shape == weight.shape == (OUT, IN)
    assert equal(read, weight)


def test_gains_multiply_what_each_output_channel_reads_back(weight: StoredWeight) -> None:
    gains = 1 + random(OUT, seed=3) / 8
    found = weight.with_gains(gains)
    # Scales are rounded to their own dtype, float16.
    torch.testing.assert_close(found.dequantize(), weight.dequantize() * gains.unsqueeze(1), rtol=2e-3, atol=2e-3)
    assert not torch.equal(found.dequantize(), weight.dequantize())
    assert found.form == weight.form
    assert {name: part.dtype for name, part in found.parts.items()} == {n: p.dtype for n, p in weight.parts.items()}
    assert equal(weight.with_gains(torch.ones(OUT)), weight)


def test_bits_are_those_of_the_stored_tensors(weight: StoredWeight) -> None:
    stored = {name: 8 * tensor.nbytes for name, tensor in weight.tensors().items() if name != "weight_shape"}
    # A word is not cut where codes end.
    assert sum(stored.values()) - 32 * (OUT + IN) < weight.code_bits + weight.scale_bits <= sum(stored.values())


def test_rows_are_the_weight_s(weight: StoredWeight) -> None:
    part = weight.rows(slice(3, 17))
    assert part.shape == (14, IN)
    assert torch.equal(part.dequantize(), weight.dequantize()[3:17])
    owned = {tensor.untyped_storage().data_ptr() for tensor in weight.parts.values()}
    assert not owned & {tensor.untyped_storage().data_ptr() for tensor in part.parts.values()}


@pytest.mark.parametrize("columns", [slice(0, 32), slice(32, 70), slice(64, 70)])
def test_columns_are_the_weight_s(weight: StoredWeight, columns: slice) -> None:
    part = weight.columns(columns)
    assert part.shape == (OUT, columns.stop - columns.start)
    assert torch.equal(part.dequantize(), weight.dequantize()[:, columns])
    owned = {tensor.untyped_storage().data_ptr() for tensor in weight.parts.values()}
    assert not owned & {tensor.untyped_storage().data_ptr() for tensor in part.parts.values()}
    assert equal(part, format_of(part.kind).from_tensors(part.tensors(), part.form))


@pytest.mark.parametrize("columns", [slice(16, 32), slice(0, 48)])
def test_a_group_of_columns_is_not_cut(columns: slice) -> None:
    with pytest.raises(ValueError, match=r"^columns: .* expected a whole number of groups of 32 columns"):
        uniform(True).columns(columns)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_product_is_that_of_the_dense_weight(
    weight: StoredWeight, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    x, bias = random(2, tokens, IN, seed=5).to(dtype), random(OUT, seed=6).to(dtype)
    y = weight.linear(x, bias)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert (y.dtype, y.shape) == (dtype, (2, tokens, OUT))
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    layer = CompensatedLinear(weight, bias=bias)
    assert torch.equal(layer(x), y)


def test_a_layer_s_weight_moves_with_it(weight: StoredWeight) -> None:
    layer = CompensatedLinear(weight)
    assert set(layer.state_dict()) == set(weight.parts)
    assert layer.weight is weight
    moved = layer.to("meta")
    assert moved.device.type == "meta"
    assert moved.weight.form == weight.form


def test_hostile_tensors_are_refused_by_name(weight: StoredWeight) -> None:
    form, tensors = weight.form, weight.tensors()
    read = format_of(weight.kind).from_tensors
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=name):
            read({key: value for key, value in tensors.items() if key != name}, form)
        with pytest.raises(ValueError, match=name):
            read({**tensors, name: tensor.to(torch.float64)}, form)
        if name != "weight_shape":
            with pytest.raises(ValueError, match=name):
                read({**tensors, name: tensor[:-1]}, form)
            if tensor.is_floating_point():
                with pytest.raises(ValueError, match=rf"{name}: holds NaN"):
                    read({**tensors, name: torch.full_like(tensor, torch.nan)}, form)
    with pytest.raises(ValueError, match="another"):
        read({**tensors, "another": torch.zeros(1)}, form)
    for shape in ([0, IN], [OUT, -1], [1 << 40, 1 << 40]):
        with pytest.raises(ValueError, match="weight_"):
            read({**tensors, "weight_shape": torch.tensor(shape)}, form)
    with pytest.raises(ValueError, match="expected"):
        read(tensors, replace(form, bits=5))


def test_a_dense_weight_that_is_held_is_made_once_and_changes_no_bit(
    weight: StoredWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, bias = random(9, IN), random(OUT)
    found = {dtype: weight.linear(x.to(dtype), bias.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    weight.hold(torch.float32)
    made: list[torch.dtype] = []
    dense_factor = type(weight).dense_factor

    def counted(self: StoredWeight, dtype: torch.dtype) -> Tensor:
        made.append(dtype)
        return dense_factor(self, dtype)

    monkeypatch.setattr(type(weight), "dense_factor", counted)
    for dtype, expected in found.items():
        assert torch.equal(weight.linear(x.to(dtype), bias.to(dtype)), expected)
    assert made == [torch.bfloat16], "on activations of another dtype it is made anew"
    other = weight.with_gains(torch.full((OUT,), 2.0))
    assert not torch.equal(other.linear(x), weight.linear(x)), "a weight that is made of it has its own"


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind: '\.\./x': expected one of sign, uniform"):
        format_of("../x")


def test_a_sign_weight_is_its_formula() -> None:
    values, row, column = random(5, 33), random(5, seed=1).abs(), random(33, seed=2).abs()
    values[2, 4] = 0.0
    stored = SignWeight.of(values, row, column)
    for i, j in product(range(5), range(33)):
        assert stored.dequantize()[i, j] == (1.0 if values[i, j] >= 0 else -1.0) * row[i] * column[j]
    assert int(stored.words[2, 0]) >> 4 & 1 == 1
    assert stored.words.shape == (5, 2)
    assert not (stored.words[:, 1] & ~1).any(), "unused bits are zero"
    assert stored.form == WeightForm(kind="sign", bits=1)
    assert (stored.code_bits, stored.scale_bits) == (5 * 2 * 32, 38 * 32)
