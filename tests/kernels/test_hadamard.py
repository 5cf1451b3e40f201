"""Hadamard matrices are orthogonal and flat at every width, and the fast transform is the product with the matrix."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from counterweight.kernels.hadamard import Hadamard, hadamard_matrix

UNKNOWN_HERE = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}
"""Multiples of 4 up to 300 that neither Paley's constructions nor doubling reach; other constructions do."""

WIDTHS_OF_MODELS = {
    768: 768,
    1536: 1536,
    896: 896,
    4864: 4864,  # core 76, Paley II
    8960: 8960,
    11008: 11008,  # core 344, the field with 7**3 elements
    13824: 13824,
    14336: 14336,
    25600: 25600,  # core 100, the field with 7**2 elements
    53248: 53248,  # core 52, the field with 5**2 elements
    5506: 2,
    1372: 196,
}
"""Width -> the order of its blocks."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("start", range(1, 301, 50))
def test_matrices_of_every_order_are_orthogonal_with_flat_blocks(start: int) -> None:
    for n in range(start, start + 50):
        matrix, order = hadamard_matrix(n), Hadamard(size=n).order
        assert matrix.dtype is torch.float64
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
        in_blocks = torch.block_diag(*[torch.ones(order, order)] * (n // order)).double()
        torch.testing.assert_close(matrix.abs(), in_blocks / math.sqrt(order), rtol=1e-14, atol=0)


def test_every_order_that_can_be_constructed_is_one_block() -> None:
    possible = {1, 2} | {n for n in range(4, 301, 4) if n not in UNKNOWN_HERE}
    assert {n for n in range(1, 301) if Hadamard(size=n).order == n} == possible


def test_blocks_are_the_largest_that_divide_the_width() -> None:
    assert {n: Hadamard(size=n).order for n in (6, 7, 92, 260, 1372)} == {6: 2, 7: 1, 92: 4, 260: 52, 1372: 196}


@pytest.mark.parametrize("power", range(6))
def test_powers_of_two_are_sylvesters(power: int) -> None:
    n = 1 << power
    rule = torch.tensor([[(-1.0) ** (row & column).bit_count() for column in range(n)] for row in range(n)])
    torch.testing.assert_close(hadamard_matrix(n), rule.double() / math.sqrt(n), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "transform",
    [
        *(Hadamard(size=size) for size in (1, 2, 7, 12, 28, 30, 64, 92, 96, 100, 172, 344)),
        Hadamard(size=96, seed=3),
        Hadamard(size=7, seed=3),
        Hadamard(size=768, seed=1),
        Hadamard(size=12, inner=5),
        Hadamard(size=14, inner=8, seed=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_transform_is_the_product_with_the_matrix(transform: Hadamard, dtype: torch.dtype) -> None:
    signs = torch.ones(transform.size, dtype=torch.float64) if transform.signs is None else transform.signs
    inner = torch.eye(transform.inner, dtype=torch.float64)
    matrix = torch.kron(signs.unsqueeze(1) * hadamard_matrix(transform.size), inner)
    x = random(2, 3, transform.width).to(dtype)
    y = transform.apply(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    torch.testing.assert_close(y.double(), x.double() @ matrix, rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-13)
    torch.testing.assert_close(transform.dense(), matrix, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("width", "order"), WIDTHS_OF_MODELS.items())
def test_wide_transforms_are_orthogonal_and_flat(width: int, order: int) -> None:
    """A dense matrix would take gigabytes: its rows, one for each unit vector, are enough."""
    transform = Hadamard(size=width)
    assert transform.order == order
    channels = [0, 1, width // 3, width // 2, width - 2, width - 1]
    units = torch.zeros(len(channels), width)
    units[torch.arange(len(channels)), channels] = 1
    rows = transform.apply(units)
    torch.testing.assert_close(rows.double() @ rows.double().T, torch.eye(len(channels)).double(), rtol=0, atol=1e-6)
    for row, channel in zip(rows, channels, strict=True):
        start = channel // order * order
        torch.testing.assert_close(row[start : start + order].abs(), torch.full((order,), order**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_transformed_in_float32(dtype: torch.dtype) -> None:
    x = (random(4, 11008) * 100).to(dtype)
    transform = Hadamard(size=11008)
    assert torch.equal(transform.apply(x), transform.apply(x.float()).to(dtype))


def test_sums_that_float16_cannot_hold_are_transformed() -> None:
    """The sum before the division by sqrt(n), 4096 * 1000, is far beyond float16's 65504."""
    y = Hadamard(size=4096).apply(torch.full((4096,), 1000.0, dtype=torch.float16))
    assert float(y[0]) == 64000
    assert float(y[1:].abs().max()) == 0


def test_signs_are_those_of_the_seed_on_every_machine() -> None:
    signs = Hadamard(size=12, seed=7).signs
    assert signs is not None
    digest = hashlib.shake_256(b"hadamard 12 7").digest(2)
    bits = format(int.from_bytes(digest, "little"), "016b")[::-1][:12]
    assert signs.tolist() == [-1.0 if bit == "1" else 1.0 for bit in bits]


def test_signs_differ_by_seed_and_are_balanced() -> None:
    first, second = Hadamard(size=4096, seed=0).signs, Hadamard(size=4096, seed=1).signs
    assert first is not None
    assert second is not None
    assert abs(float(first.mean())) < 0.1
    assert abs(float((first * second).mean())) < 0.1
    assert Hadamard(size=4096).signs is None


def test_the_input_stays_as_it_was() -> None:
    x = random(3, 24)
    before = x.clone()
    Hadamard(size=24, seed=0).apply(x)
    Hadamard(size=1).apply(x[:, :1])
    assert torch.equal(x, before)


def test_no_rows_are_transformed_to_no_rows() -> None:
    assert Hadamard(size=24).apply(torch.zeros(0, 24)).shape == (0, 24)


def test_sizes_and_widths_that_are_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match="size: 0: expected at least 1"):
        Hadamard(size=0)
    with pytest.raises(ValueError, match="inner: -1: expected at least 1"):
        Hadamard(size=4, inner=-1)
    with pytest.raises(ValueError, match="n: 0: expected at least 1"):
        hadamard_matrix(0)
    with pytest.raises(ValueError, match=r"x: \[2, 48\]: expected 24 channels"):
        Hadamard(size=12, inner=2).apply(torch.zeros(2, 48))
