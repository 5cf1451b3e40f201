"""Products of groups of rows with weights of their own, and their second moments, against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterweight.kernels.gpu.gram import add_grams_, add_products_
from counterweight.kernels.gpu.grouped import ALIGNED, Places, grouped_linear
from tests.kernels.gpu.guarded import bands_are_intact, guarded

COUNTS = {"some without rows": [0, 130, 3, 0, 40], "none": [0, 0], "many": [1] * 9}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bounds_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def places(tensors: list[Tensor | None]) -> Places:
    found = Places.of(tensors)
    assert found is not None
    return found


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("columns", "rows", "dtype"), [(72, 40, torch.float16), (128, 128, torch.float16), (72, 40, torch.float32)]
)
def test_each_group_by_its_own_weight(
    columns: int, rows: int, dtype: torch.dtype, counts: list[int], device: torch.device
) -> None:
    bounds = bounds_of(counts)
    x = random(int(bounds[-1]) + 5, columns).to(dtype).to(device)
    weights = [random(rows, columns, seed=group).to(dtype).to(device) for group in range(len(counts))]
    found = grouped_linear(x, bounds.to(device), places([*weights]))
    expected = torch.zeros(len(x), rows, dtype=torch.float64, device=device)
    for group, weight in enumerate(weights):
        own = slice(int(bounds[group]), int(bounds[group + 1]))
        expected[own] = x[own].double() @ weight.double().T
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert found[int(bounds[-1]) :].eq(0).all()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("width", [70])
def test_each_group_is_added_to_its_own_total(width: int, counts: list[int], device: torch.device) -> None:
    from counterweight.workers.calibration.triangle import LowerTriangle

    bounds = bounds_of(counts)
    x = random(int(bounds[-1]) + 5, width).half().to(device)
    y = random(len(x), width, seed=1).half().to(device)
    before = random(width, width, seed=2).double()
    triangles = [guarded(LowerTriangle.of(before).entries.to(device)) for _ in counts]
    squares = [guarded(before.to(device)) for _ in counts]
    left_out = len(counts) // 2  # of several one is in no table, and stays as it is
    chosen = [one if len(counts) == 1 or group != left_out else None for group, one in enumerate(triangles)]
    add_grams_(places([*chosen]), x, bounds.to(device))
    add_products_(places([*squares]), x, y, bounds.to(device))
    for group, (triangle, square) in enumerate(zip(triangles, squares, strict=True)):
        own = slice(int(bounds[group]), int(bounds[group + 1]))
        one, other = x[own].double().cpu(), y[own].double().cpu()
        gram = before if chosen[group] is None else before + one.T @ one
        found = LowerTriangle(width, triangle.cpu()).square().tril()
        torch.testing.assert_close(found, gram.tril(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(square.cpu(), before + one.T @ other, rtol=1e-5, atol=1e-4)
        assert bands_are_intact(triangle)
        assert bands_are_intact(square)


def test_places_are_of_tensors_that_are_alike() -> None:
    one = torch.zeros(8, 16)
    assert Places.of([None, None]) is None
    assert Places.of([one, one.T.contiguous()]) is None
    assert Places.of([one, one.double()]) is None
    bytes_apart = torch.zeros(8 * 16 + 1)[1:].view(8, 16)
    assert bytes_apart.data_ptr() % ALIGNED
    assert Places.of([one, bytes_apart]) is None
    found = places([torch.zeros(2, 4), None])
    assert found.elements.tolist() == [0, -1]


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    weights = places([torch.zeros(8, 16, device=device)])
    x, bounds = torch.zeros(4, 16, device=device), torch.tensor([0, 4], device=device)
    for wrong in (x[:, :8], x.half(), x[0]):
        with pytest.raises(ValueError, match=r"x: |weights: "):
            grouped_linear(wrong, bounds, weights)
    totals = places([torch.zeros(16, 16, dtype=torch.float64, device=device)])
    for other in (bounds[:1], bounds.int()):
        with pytest.raises(ValueError, match="bounds: "):
            grouped_linear(x, other, weights)
        with pytest.raises(ValueError, match="bounds: "):
            add_products_(totals, x, x, other)
