"""The layer on kernels against the layer in torch, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.kernels.backend import on_kernels
from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.gpu.host_memory import HostArena
from counterweight.kernels.gpu.linear import KernelLinear
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.residual import Correction, ResidualStore
from counterweight.kernels.weights.uniform import UniformWeight

OUT, IN = 96, 128


def weight(device: torch.device, *, bits: int = 4, group_size: int | None = 64) -> UniformWeight:
    source = torch.Generator().manual_seed(1)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (OUT, IN), generator=source, dtype=torch.int8)
    groups = 1 if group_size is None else IN // group_size
    scale = 0.01 + 0.01 * torch.rand(OUT, groups, generator=source)
    return UniformWeight(codes=codes, scale=scale, zero_point=None, bits=bits, group_size=group_size).to(device)


def low_rank(device: torch.device, *, codes: bool = False) -> LowRank:
    source = torch.Generator().manual_seed(2)
    up, down = torch.randn(OUT, 5, generator=source), torch.randn(5, IN, generator=source)
    if not codes:
        return LowRank(up=0.05 * up, down=0.05 * down).to(device)
    return LowRank(
        up=(20 * up).round().clamp(-127, 127).to(torch.int8),
        down=(20 * down).round().clamp(-127, 127).to(torch.int8),
        up_scale=torch.full((5,), 0.002) * torch.arange(1, 6),
        down_scale=torch.full((5,), 0.003),
    ).to(device)


def correction(device: torch.device, selection: Any = "chunked", channels: int = 100) -> Correction:
    source = torch.Generator().manual_seed(3)
    codes = torch.randint(-7, 8, (OUT, IN), generator=source, dtype=torch.int8)
    thresholds = torch.linspace(4, 0, IN)
    store = ResidualStore.of(codes, torch.full((OUT,), 0.01), thresholds)
    importance = torch.rand(IN, generator=source) if selection == "static" else None
    return Correction(store=store, selection=selection, channels_per_chunk=channels, importance=importance).to(device)


def inputs(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(4)).to(device)


CHUNKED = "residual, chunked"
PARTS: dict[str, Any] = {
    "codes alone": lambda _: {},
    "bias": lambda d: {"bias": torch.randn(OUT, generator=torch.Generator().manual_seed(5)).to(d)},
    "branch": lambda d: {"low_rank": low_rank(d)},
    "branch of codes": lambda d: {"low_rank": low_rank(d, codes=True)},
    "activations": lambda _: {"activations": ActivationFormat(bits=8, clip=0.9)},
    "transform": lambda _: {"transform": Hadamard(size=32, inner=4, seed=1)},
    CHUNKED: lambda d: {"residual": correction(d)},
    "residual, many": lambda d: {"residual": correction(d, channels=900)},
    "residual, bucketed": lambda d: {"residual": correction(d, "bucketed")},
    "residual, exact": lambda d: {"residual": correction(d, "exact")},
    "residual, static": lambda d: {"residual": correction(d, "static")},
    "all": lambda d: {
        "low_rank": low_rank(d),
        "activations": ActivationFormat(bits=4),
        "transform": Hadamard(size=128),
        "residual": correction(d, "static"),
    },
}


SHAPES = {"one token": (1, 1), "a few": (3, 2), "many": (1, 40)}


# The interpreter sorts 1024 channels a second: not for many tokens.
@pytest.mark.parametrize(
    ("part", "tokens"), [(part, tokens) for part in PARTS for tokens in SHAPES if (part, tokens) != (CHUNKED, "many")]
)
def test_it_means_what_the_torch_layer_means(part: str, tokens: str, device: torch.device) -> None:
    parts = PARTS[part](device)
    linear = CompensatedLinear(weight(device), **parts)
    x = inputs(device, *SHAPES[tokens])
    expected, found = linear(x), KernelLinear(linear)(x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    apart = ~torch.isclose(found, expected, rtol=1e-4, atol=1e-4).flatten(0, -2).all(-1)
    # The sums of a transform differ in their last bits: of 40 tokens one may have a value that rounds to the next code.
    assert apart.sum() <= (len(apart) // 40 if {"transform", "activations"} <= parts.keys() else 0)
    if apart.any():
        step = parts["transform"].apply(x).abs().max() / (2 ** (parts["activations"].bits - 1) - 1)
        assert (found - expected).abs().max() <= step * linear.weight.dequantize().abs().max() + 1e-4
    if part != "codes alone":
        plain = CompensatedLinear(weight(device))(x)
        assert (found - plain).abs().max() > 1e-3, f"{part} does nothing"


@pytest.mark.parametrize("part", ["branch", "activations", "residual, static", "all"])
def test_no_tokens_give_an_empty_result(part: str, device: torch.device) -> None:
    linear = CompensatedLinear(weight(device), **PARTS[part](device))
    x = inputs(device, 1, 1)[:, :0]
    assert KernelLinear(linear)(x).shape == linear(x).shape == (1, 0, linear.out_features)


@pytest.mark.parametrize("part", ["branch", "residual, static"])
def test_an_input_need_not_be_contiguous(part: str, device: torch.device) -> None:
    linear = CompensatedLinear(weight(device), **PARTS[part](device))
    x = inputs(device, 3, 2).transpose(0, 2).contiguous().transpose(0, 2)
    assert x.stride(-1) != 1
    torch.testing.assert_close(KernelLinear(linear)(x), linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_of_code(bits: int, device: torch.device) -> None:
    linear = CompensatedLinear(weight(device, bits=bits, group_size=None), activations=ActivationFormat(bits=8))
    for tokens in (2, 40):
        x = inputs(device, 1, tokens)
        torch.testing.assert_close(KernelLinear(linear)(x), linear(x), rtol=1e-4, atol=1e-4)


def test_a_residual_that_decodes_only_leaves_prompts_alone(device: torch.device) -> None:
    linear = CompensatedLinear(weight(device), residual=correction(device), decode_only=True)
    kernel = KernelLinear(linear)
    for tokens in (1, 7):
        x = inputs(device, 2, tokens)
        torch.testing.assert_close(kernel(x), linear(x), rtol=1e-4, atol=1e-4)


def test_residual_rows_are_read_from_the_arena(device: torch.device) -> None:
    linear = CompensatedLinear(weight(device), residual=correction(device))
    assert linear.residual is not None
    with HostArena(HostArena.size_of([linear.residual.store.packed.nbytes])) as arena:
        kernel = KernelLinear(linear, arena)
        assert kernel.residual is not None
        x = inputs(device, 1, 1)
        torch.testing.assert_close(kernel(x), linear(x), rtol=1e-4, atol=1e-4)
        kernel.residual.store.packed.zero_()
        plain = CompensatedLinear(weight(device))(x)
        assert (kernel(x) - plain).abs().max() > 1e-4  # codes of zero stand for -8 steps, not for nothing


def test_the_switch(device: torch.device) -> None:
    linear = CompensatedLinear(weight(device))
    assert on_kernels(linear, "torch") is linear
    assert isinstance(on_kernels(linear, "triton"), KernelLinear)
    assert isinstance(on_kernels(linear), KernelLinear if device.type == "cuda" else CompensatedLinear)


def test_what_has_no_kernel_is_refused_or_left_to_torch(device: torch.device) -> None:
    grouped = CompensatedLinear(weight(device), activations=ActivationFormat(bits=8, group_size=32))
    assert on_kernels(grouped) is grouped
    with pytest.raises(ValueError, match=r"kernels: triton: activations.group_size: 32: expected None"):
        on_kernels(grouped, "triton")
    odd = CompensatedLinear(weight(device, group_size=16))
    with pytest.raises(ValueError, match="kernels: triton: group_size: 16"):
        on_kernels(odd, "triton")
