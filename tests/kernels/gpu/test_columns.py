"""The loops over a block's columns against those in torch, and the codes of a whole weight against what defines them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.kernels import columns as loops
from counterweight.kernels.columns import ColumnGrid
from counterweight.kernels.gpu import columns as kernel
from counterweight.kernels.weights import StoredWeight

pytest.importorskip("pydantic")  # of the solver's options; the rest of this folder needs torch and triton alone

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.quantizers import GPTQ
from counterweight.workers.quantization.gptq import gptq
from tests.kernels.gpu.guarded import bands_are_intact, guarded

CASES = [(1, 16, 32, False), (2, 7, 70, True), (1, 64, 33, False)]
"""Weights, columns of the block, output channels, zero points."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(weights: int, columns: int, channels: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor, ColumnGrid]:
    """Targets, aims (or slopes), what columns count for each other, and a grid of 3 bits."""
    shape = (weights, columns, channels)
    steps = random(*shape, seed=3).abs() * 0.3 + 0.2
    zero = random(*shape, seed=4).round().clamp(-4, 3) if zeros else None
    target = random(*shape, seed=0)
    aim = target + 0.1 * random(*shape, seed=1)
    return (
        target,
        aim,
        0.2 * random(weights, columns, columns, seed=2),
        ColumnGrid(steps=steps, zeros=zero, lowest=-4, highest=3),
    )


def on(device: torch.device, grid: ColumnGrid) -> ColumnGrid:
    return replace(grid, steps=grid.steps.to(device), zeros=None if grid.zeros is None else grid.zeros.to(device))


def agree(found: Tensor, expected: Tensor) -> None:
    """Alike but for channels in which a sum that was rounded otherwise met a tie."""
    same = (found.cpu() - expected).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.95


@pytest.mark.parametrize(("weights", "columns", "channels", "zeros"), CASES)
def test_errors_are_fed_back_as_in_torch(
    weights: int, columns: int, channels: int, zeros: bool, device: torch.device
) -> None:
    target, aim, feed, grid = problem(weights, columns, channels, zeros)
    codes, error = torch.empty_like(target), torch.empty_like(target)
    loops.feed_back_(codes, error, target=target, aim=aim.clone(), feed=feed, grid=grid)
    found, left = guarded(torch.zeros_like(target).to(device)), guarded(torch.zeros_like(target).to(device))
    kernel.feed_back_(
        found, left, target=target.to(device), aim=aim.to(device), feed=feed.to(device), grid=on(device, grid)
    )
    assert bands_are_intact(found)
    assert bands_are_intact(left)
    agree(found, codes)
    torch.testing.assert_close(left.cpu(), target - found.cpu() * grid.steps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weights", "columns", "channels", "zeros"), CASES)
def test_codes_descend_as_in_torch(
    weights: int, columns: int, channels: int, zeros: bool, device: torch.device
) -> None:
    target, slope, pull, grid = problem(weights, columns, channels, zeros)
    before = (target / grid.steps).round().clamp(-2, 2)
    error = target - before * grid.steps
    codes, left = torch.empty_like(target), error.clone()
    loops.descend_(codes, left, before=before, slope=slope.clone(), pull=pull, grid=grid)
    found, kept = guarded(torch.zeros_like(target).to(device)), guarded(error.to(device))
    kernel.descend_(
        found, kept, before=before.to(device), slope=slope.to(device), pull=pull.to(device), grid=on(device, grid)
    )
    assert bands_are_intact(found)
    assert bands_are_intact(kept)
    agree(found, codes)
    torch.testing.assert_close(kept.cpu(), target - found.cpu() * grid.steps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_whole_weight_has_the_codes_that_it_has_elsewhere(
    group_size: int | None, symmetric: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 columns: a block of 64 and one of 6."""
    columns = 70 if group_size is None else 96
    weight = random(1, 24, columns, seed=0)
    x = random(400, columns, seed=1) * random(columns, seed=2).exp()
    form = WeightFormat(bits=3, group_size=group_size, symmetric=symmetric)
    calls: list[str] = []

    def chosen(where: torch.device, *, kernels: bool) -> StoredWeight:
        monkeypatch.setattr(loops, "runs_kernels", lambda _: kernels)
        statistics = InputStatistics.of(x.to(where))
        (found,) = gptq(GPTQ(block_size=128), weight.to(where), [statistics], form, torch.float32)
        return found.weight.to(torch.device("cpu"))

    def counted(name: str) -> Any:
        plain = getattr(kernel, name)
        return lambda *given, **named: (calls.append(name), plain(*given, **named))[1]

    for name in ("feed_back_", "descend_"):
        monkeypatch.setattr(kernel, name, counted(name))
    expected, found = chosen(torch.device("cpu"), kernels=False), chosen(device, kernels=True)
    assert calls.count("feed_back_") == 2
    assert calls.count("descend_") in (2, 4)  # both blocks, once or twice

    def cost(stored: StoredWeight) -> float:
        return float(((weight[0] - stored.dequantize()).double() @ x.double().T).square().sum())

    assert cost(found) == pytest.approx(cost(expected), rel=2e-3)
    # Codes and not values: a GPU divides by a number as it multiplies by its inverse, so steps differ in their last bit.
    assert (found.parts["codes"] == expected.parts["codes"]).all(1).float().mean() > 0.8


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    target, aim, feed, grid = problem(1, 8, 16, zeros=False)
    right = {"target": target.to(device), "aim": aim.to(device), "feed": feed.to(device), "grid": on(device, grid)}
    codes = torch.empty_like(right["target"])
    wide = torch.empty(1, kernel.MOST_COLUMNS + 1, 16, device=device)
    with pytest.raises(ValueError, match="codes: 65 columns"):
        kernel.feed_back_(wide, wide, **right)
    for name, wrong in {
        "target": right["target"].double(),
        "aim": right["aim"].transpose(1, 2).contiguous().transpose(1, 2),
        "feed": right["feed"][:, :7],
        "grid": replace(right["grid"], steps=right["grid"].steps[:, :7]),
    }.items():
        with pytest.raises(ValueError, match=f"{name}"):
            kernel.feed_back_(codes, codes.clone(), **{**right, name: wrong})
