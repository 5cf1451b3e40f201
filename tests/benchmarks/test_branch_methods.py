"""The methods that `benchmarks/branches.py` compares, where a closed form says what they come to."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.workers.calibration.statistics import Gathering, InputStatistics

INPUT = Gathering(activations=ActivationFormat(bits=4, clip=0.9))
ROWS, COLUMNS = 48, 64


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("benchmarks")
        return importlib.import_module("branch_methods")


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """[tokens, in], of a spectrum that falls."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.linspace(0.2, 2, COLUMNS)
    return torch.randn(1024, COLUMNS, generator=generator) @ mixed.T


@pytest.fixture(scope="module")
def statistics(rows: Tensor) -> InputStatistics:
    return InputStatistics.of(rows, INPUT)


def budget(methods: ModuleType, rank: int, bits: int) -> int:
    return rank * methods.direction_bits(ROWS, COLUMNS, bits)


def test_srr_that_preserves_nothing_is_whitened_svd(
    methods: ModuleType, weight: Tensor, statistics: InputStatistics
) -> None:
    bits = budget(methods, 8, 16)
    ours = methods.preserved(weight, statistics, bits, bits=16, share=0.0)
    known = methods.whitened(weight, statistics, bits, bits=16)
    assert torch.equal(ours.dense, known.dense)
    assert ours.bits == known.bits
    torch.testing.assert_close(ours.branch.product(), known.branch.product(), rtol=0, atol=2e-2)
    assert ours.error(weight, statistics) == pytest.approx(known.error(weight, statistics), rel=1e-3)


def test_srr_preserves_the_leading_directions(methods: ModuleType, weight: Tensor, statistics: InputStatistics) -> None:
    """Eckart-Young: of all matrices of rank 8 the branch takes most of W E[x x^T]^(1/2)."""
    found = methods.preserved(weight, statistics, budget(methods, 8, 16), bits=16, share=1.0)
    root = torch.linalg.cholesky(statistics.gram)
    values = torch.linalg.svdvals(weight.double() @ root)
    left = (weight.double() - found.branch.product(torch.float64)) @ root
    assert float(left.square().sum() / values[8:].square().sum()) == pytest.approx(1, rel=1e-3)


def test_srr_splits_by_the_criterion(methods: ModuleType, statistics: InputStatistics) -> None:
    """A weight of rank 5 behind which nothing is left to code: all its directions are preserved, and none where all are
    alike."""
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(ROWS, 5, generator=generator) @ torch.randn(5, COLUMNS, generator=generator)
    root = torch.linalg.cholesky(statistics.gram)
    assert methods.balanced(low.double(), statistics, root, 8) >= 5
    flat = torch.linalg.qr(torch.randn(COLUMNS, ROWS, generator=generator))[0].T.double() @ torch.linalg.inv(root)
    coded = methods.balanced(flat, statistics, root, 8)
    error = flat - methods.quantized(flat, statistics.product("yy"), statistics.tokens).dequantize()
    squares = torch.linalg.svdvals(error @ root).square()
    exposed = [(1 - k / ROWS) ** 0.5 for k in range(9)]
    unrecovered = [float(1 - squares[: 8 - k].sum() / squares.sum()) ** 0.5 for k in range(9)]
    products = [one * other for one, other in zip(exposed, unrecovered, strict=True)]
    assert coded == products.index(min(products))


def test_serq_with_all_channels_salient_leaves_a_second_rounding(
    methods: ModuleType, weight: Tensor, statistics: InputStatistics
) -> None:
    """The regression on all channels is the error itself: what stays is what coding it in 4 bits leaves."""
    found = methods.serq(weight, statistics, 4 * weight.numel() + 16 * ROWS)
    plain = methods.no_branch(weight, statistics, 0)
    second = methods.no_branch(weight - plain.dense, statistics, 0)
    root = torch.linalg.cholesky(statistics.product("yy"))

    def left(dense: Tensor) -> float:
        return float(((weight - dense).double() @ root).square().sum())

    assert left(found.dense) == pytest.approx(left(plain.dense + second.dense), rel=1e-2)
    assert left(found.dense) < left(plain.dense) / 32
    assert found.bits == plain.bits + second.bits


def test_unquantized_channels_all_of_them_leave_no_noise(
    methods: ModuleType, weight: Tensor, statistics: InputStatistics
) -> None:
    """What sees the quantized input is no more than what coding the weight in 4 bits leaves."""
    found = methods.unquantized_channels(weight, statistics, 4 * weight.numel() + 16 * ROWS)
    exact = methods.exact(weight, statistics, 0)
    assert found.error(weight, statistics) < exact.error(weight, statistics) / 20


@pytest.mark.parametrize("noise", [0.05, 0.25])
def test_deflation_hides_what_the_branch_can_write(
    methods: ModuleType, weight: Tensor, rows: Tensor, statistics: InputStatistics, noise: float
) -> None:
    """Behind the codes nothing that reads the same directions of the input writes better: least squares on the tokens."""
    found = methods.deflated(weight, statistics, budget(methods, 8, 16), bits=16, noise=noise)
    up, down = found.branch.factors(torch.float32)
    left = rows.double() @ (weight - found.dense).double().T
    read = rows.double() @ down.double().T
    best = torch.linalg.lstsq(read, left).solution

    def squares(matrix: Tensor) -> float:
        return float((left - read @ matrix).square().sum())

    assert squares(up.T.double()) == pytest.approx(squares(best), rel=5e-3)  # stored in bfloat16
    assert squares(best) < 0.9 * squares(torch.zeros_like(best))


def test_joined_branches_add_up(methods: ModuleType, weight: Tensor) -> None:
    matrix = weight.double()
    parts = [methods.kept(methods.leading(one, torch.eye(COLUMNS).double(), 4), 4) for one in (matrix, matrix.flip(0))]
    both = methods.joined(parts)
    torch.testing.assert_close(both.product(), parts[0].product() + parts[1].product())
    assert (both.rank, both.bits) == (8, parts[0].bits + parts[1].bits)


def test_every_method_keeps_to_its_bits(methods: ModuleType, weight: Tensor, statistics: InputStatistics) -> None:
    alone = methods.no_branch(weight, statistics, 0).bits
    least = methods.direction_bits(ROWS, COLUMNS, 16)
    asked = int(2.4 * weight.numel())
    for found in (
        methods.whitened(weight, statistics, asked, bits=4),
        methods.corrected(weight, statistics, asked, bits=8, last="branch"),
        methods.corrected(weight, statistics, asked, bits=4, last="codes"),
        methods.corrected(weight, statistics, asked, bits=4, last="codes", weights=methods.Weights(bits=3)),
        methods.serq(weight, statistics, asked),
        methods.unquantized_channels(weight, statistics, asked),
        methods.preserved(weight, statistics, asked, bits=4),
        methods.preserved(weight, statistics, asked, bits=4, share=0.75, of="lost"),
        methods.deflated(weight, statistics, asked, bits=16),
    ):
        assert alone + asked - least < found.bits <= alone + asked
