"""Choice of channels bit for bit as the reference has it; the sums against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterweight.kernels.gpu import launch
from counterweight.kernels.gpu.error_compensation import (
    MOST_PER_CHUNK,
    add_rows_,
    blocks,
    compensate_,
    select_channels,
    select_kernel,
    unsupported,
)
from counterweight.kernels.residual import ResidualStore, select_chunked
from tests.kernels.gpu.guarded import bands_are_intact, guarded


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(tokens: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """With outliers that differ by token, and equals among them: few digits are left."""
    x = torch.randn(tokens, columns, generator=generator(seed)) ** 3
    return guarded(((x * 8).round() / 8).to(dtype).to(device))


def store(out_features: int, in_features: int, bits: int, device: torch.device) -> ResidualStore:
    top = (1 << (bits - 1)) - 1
    codes = torch.randint(-top, top + 1, (out_features, in_features), generator=generator(1)).to(torch.int8)
    scale = torch.rand(out_features, generator=generator(2)) + 0.1
    made = ResidualStore.of(codes, scale, torch.zeros(in_features), bits=bits).to(device)
    return replace(made, packed=guarded(made.packed), scale=guarded(made.scale))


def exact(x: Tensor, residual: ResidualStore, selected: Tensor) -> Tensor:
    return torch.where(selected, x.double(), 0.0) @ residual.dense().double().T


def mask(channels: Tensor, columns: int) -> Tensor:
    chosen = torch.zeros(channels.shape[0], columns, dtype=torch.bool, device=channels.device)
    return chosen.scatter_(1, channels.long(), True)


def assert_near(y: Tensor, expected: Tensor) -> None:
    """Rounding of float32 sums alone."""
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize(
    ("tokens", "columns", "per_chunk", "dtype"),
    [
        (1, 40, 3, torch.float16),
        (1, 1024, 5, torch.bfloat16),
        (2, 1100, 16, torch.float16),
        (1, 2500, 7, torch.float32),
    ],
)
def test_selects_what_the_reference_selects(
    tokens: int, columns: int, per_chunk: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = activations(tokens, columns, dtype, device)
    channels = select_channels(x, per_chunk)
    assert channels.shape[1] == max(1, per_chunk * columns // 1024)
    assert torch.equal(mask(channels, columns), select_chunked(x, per_chunk))


def test_lowest_channels_win_among_equals_and_zeros_count(device: torch.device) -> None:
    x = torch.zeros(1, 1024, dtype=torch.float16, device=device)
    x[0, [700, 3, 900]] = -1.0
    assert select_channels(x, 2).tolist() == [[3, 700]]
    assert select_channels(x, 5).tolist() == [[3, 700, 900, 0, 1]]


def test_a_last_chunk_has_its_share(device: torch.device) -> None:
    """16 of every 1024 are one of 64: in channels 1024 .. 1087 the kernel chooses one, of 63 none."""
    x = torch.ones(1, 1088, dtype=torch.float16, device=device)
    x[0, 1087] = 2.0
    assert select_channels(x, 16).tolist() == [[*range(16), 1087]]
    assert select_channels(x[:, :1087], 16).tolist() == [[*range(16)]]


def test_each_program_writes_its_share_and_no_more(device: torch.device) -> None:
    """Of 1087 channels, 11 of every 1024: the second chunk has none. One program alone, and both."""
    x = activations(1, 1087, torch.float16, device)
    for chosen, programs in ((30, 1), (11, 2)):
        channels = guarded(torch.full((1, chosen), -1, dtype=torch.int32, device=device))
        with launch.current(device):
            select_kernel[(programs, 1)](x, channels, 1087, 1087, 11, chosen, CHUNK=1024, LARGEST=16, EXACT_KEYS=False)
        assert torch.equal(channels[:, :11], select_channels(x[:, :1024], 11))
        assert (channels[:, 11:] == -1).all()
        assert bands_are_intact(channels)


def test_tells_float32_apart_where_a_16_bit_key_would_not(device: torch.device) -> None:
    x = torch.ones(1, 64, device=device)
    x[0, 50] = 1 + 2**-22
    assert select_channels(x, 16).tolist() == [[50]]


def test_infinity_and_nan_come_first(device: torch.device) -> None:
    x = torch.ones(1, 64, device=device)
    x[0, 50], x[0, 60] = -math.inf, math.nan
    assert select_channels(x, 32).tolist() == [[60, 50]]


@pytest.mark.parametrize(
    ("bits", "out_features", "columns", "per_chunk", "dtype"),
    [
        (4, 264, 1100, 16, torch.float16),
        (4, 13, 40, 30, torch.float32),
        (2, 100, 1024, 5, torch.float32),
        (8, 70, 600, 9, torch.bfloat16),
        (4, 40, 1024, 100, torch.float16),
    ],
)
def test_adds_the_chosen_rows(
    bits: int, out_features: int, columns: int, per_chunk: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, residual = activations(2, columns, dtype, device), store(out_features, columns, bits, device)
    before = torch.randn(2, out_features, generator=generator(3)).to(device)
    y = guarded(before)
    assert compensate_(y, x, residual, per_chunk) is y
    assert_near(y, before.double() + exact(x, residual, select_chunked(x, per_chunk)))
    assert bands_are_intact(y)


@pytest.mark.parametrize("words", [20, 600, 1100])
def test_every_block_of_outputs_is_reached(words: int, device: torch.device) -> None:
    """One block of words; some a program; blocks of 64, of which a program takes several."""
    out_features = 4 * words - 3
    x, residual = activations(1, 24, torch.float32, device), store(out_features, 24, 8, device)
    y = guarded(torch.zeros(1, out_features, device=device))
    add_rows_(y, x, residual, torch.tensor([[5, 23]], device=device))
    assert_near(y, exact(x, residual, mask(torch.tensor([[5, 23]], device=device), 24)))
    assert bands_are_intact(y)


def test_more_rows_than_are_in_flight(device: torch.device) -> None:
    x, residual = activations(1, 200, torch.float32, device), store(16, 200, 4, device)
    channels = torch.randperm(200, generator=generator(4))[:150].to(device)
    assert blocks(150, 2, 4)[0] < 150
    y = add_rows_(torch.zeros(16, device=device), x[0], residual, channels)
    assert_near(y, exact(x, residual, mask(channels[None], 200))[0])
    assert torch.equal(y, add_rows_(torch.zeros(16, device=device), x[0], residual, channels))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_channels_chosen_outside_for_all_tokens_or_for_each(index: torch.dtype, device: torch.device) -> None:
    x, residual = activations(3, 60, torch.float16, device), store(40, 60, 4, device)
    each = torch.stack([torch.randperm(60, generator=generator(seed))[:7] for seed in range(3)]).to(index).to(device)
    y = add_rows_(torch.zeros(3, 40, device=device), x, residual, each)
    assert_near(y, exact(x, residual, mask(each, 60)))
    y = add_rows_(torch.zeros(3, 40, device=device), x, residual, each[0])
    assert_near(y, exact(x, residual, mask(each[:1].expand(3, -1), 60)))


def test_overwrites_when_it_shall_not_accumulate(device: torch.device) -> None:
    x, residual = activations(2, 60, torch.float16, device), store(40, 60, 4, device)
    channels = torch.tensor([3, 59], device=device)
    y = add_rows_(torch.full((2, 40), math.nan, device=device), x, residual, channels, accumulate=False)
    assert_near(y, exact(x, residual, mask(channels[None].expand(2, -1), 60)))


def test_one_token_without_a_dimension_and_rows_of_wider_tensors(device: torch.device) -> None:
    x, residual = activations(2, 90, torch.float16, device), store(40, 60, 4, device)
    wide, channels = torch.zeros(2, 50, device=device), torch.tensor([0, 59], device=device)
    add_rows_(wide[:, :40], x[:, :60], residual, channels)
    assert_near(wide[:, :40], exact(x[:, :60], residual, mask(channels[None].expand(2, -1), 60)))
    assert not wide[:, 40:].any()
    y = torch.zeros(40, device=device)
    assert compensate_(y, x[1, :60], residual, 100) is y
    assert_near(y, exact(x[1, :60], residual, select_chunked(x[1, :60], 100)))


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    x, residual = activations(2, 60, torch.float16, device), store(40, 60, 4, device)
    y, channels = torch.zeros(2, 40, device=device), torch.tensor([1], device=device)
    for per_chunk in (0, MOST_PER_CHUNK + 1):
        with pytest.raises(ValueError, match="channels_per_chunk"):
            compensate_(y, x, residual, per_chunk)
    with pytest.raises(ValueError, match=r"x: torch\.float64"):
        select_channels(x.double(), 4)
    with pytest.raises(ValueError, match="x: 59 channels: expected 60"):
        add_rows_(y, x[:, :59], residual, channels)
    with pytest.raises(ValueError, match=r"x: .*rows contiguous"):
        add_rows_(y, x.T, residual, channels)
    with pytest.raises(ValueError, match=r"y: .*float64"):
        add_rows_(y.double(), x, residual, channels)
    with pytest.raises(ValueError, match="y: "):
        add_rows_(y[:1], x, residual, channels)
    with pytest.raises(ValueError, match="channels: "):
        add_rows_(y, x, residual, channels.half())
    with pytest.raises(ValueError, match="channels: "):
        add_rows_(y, x, residual, channels.expand(3, 1))
    strided = replace(residual, packed=torch.cat([residual.packed] * 2, 1)[:, :5])
    assert "contiguous" in str(unsupported(x, strided))
    with pytest.raises(ValueError, match="contiguous"):
        add_rows_(y, x, strided, channels)
    assert unsupported(x, residual) is None
    assert "no kernel runs there" in str(unsupported(x.to("meta"), residual))


def test_refuses_residuals_that_the_gpu_cannot_reach(device: torch.device) -> None:
    x, residual = activations(2, 60, torch.float16, device), store(40, 60, 4, device)
    elsewhere = torch.device("meta" if device.type == "cpu" else "cpu")
    assert "scale" in str(unsupported(x, replace(residual, scale=residual.scale.to(elsewhere))))
    assert "not pinned" in str(unsupported(x, replace(residual, packed=residual.packed.to(elsewhere))))
