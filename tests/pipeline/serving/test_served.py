"""A layer whose tensors are packed between calls computes what the layer computes, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterweight.kernels.linear import CompensatedLinear
from counterweight.pipeline.serving.served import PackedLinear, linear_of, served
from tests.pipeline.serving.layers import IN, LAYERS, OUT, expected, random, store


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layer(name: str, dtype: torch.dtype, tokens: int) -> None:
    layer, x = LAYERS[name], random(tokens, IN, seed=9).to(dtype)
    y = served(layer)(x)
    assert y.dtype == dtype
    assert torch.equal(y, linear_of(layer)(x))


@pytest.mark.parametrize("name", LAYERS)
def test_it_takes_what_the_checkpoint_takes(name: str) -> None:
    layer = LAYERS[name]
    weight = sum(tensor.nbytes for tensor in layer.weight.tensors().values())
    branch = 0 if layer.low_rank is None else layer.low_rank.bits // 8
    assert sum(buffer.nbytes for buffer in served(layer).buffers()) == weight + branch


def test_a_store_corrects_the_tokens_that_are_decoded() -> None:
    correction = store()
    layer = replace(LAYERS["a Hadamard transform"], residual=correction)
    x, module = random(5, IN, seed=9), served(layer)
    assert isinstance(module, PackedLinear)
    without = served(replace(layer, residual=None))(x)
    assert torch.equal(module(x, None), without)
    decoded = torch.tensor([True, False, False, True, False])
    y = module(x, decoded)
    assert torch.equal(y[~decoded], without[~decoded])
    assert layer.transform is not None
    turned = (x.double() @ layer.transform.dense()).float()
    added = torch.where(correction.select(turned), turned.double(), 0.0) @ correction.store.dense().double().T
    torch.testing.assert_close((y - without)[decoded].double(), added[decoded], rtol=1e-4, atol=1e-4)
    assert added[decoded].abs().max() > 0.1


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["3 bits, a branch", "int8 factors", "a Hadamard transform"])
def test_on_kernels_it_is_the_same(name: str, tokens: int) -> None:
    """Under Triton's interpreter, where there is no GPU."""
    layer, x = LAYERS[name], random(tokens, IN, seed=9)
    module = served(layer, kernels="triton")
    assert not isinstance(module, PackedLinear)
    y = module(x)
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=0, atol=1e-5 * float(y.abs().max()))


def test_without_a_gpu_it_is_plain_torch() -> None:
    assert isinstance(served(LAYERS["weight alone"]), PackedLinear)
    assert served(LAYERS["weight alone"])(random(2, IN)).shape == (2, OUT)
    assert isinstance(linear_of(LAYERS["weight alone"]), CompensatedLinear)
