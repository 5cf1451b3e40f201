"""What a step is said to compute is what torch executes for it, and the factorizations' constants are the textbooks'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from counterweight.kernels.hadamard import Hadamard
from counterweight.workers import matrix_bytes, matrix_flops
from counterweight.workers.calibration.statistics import ShardMoments
from counterweight.workers.calibration.triangle import TRIANGLE_BLOCK
from counterweight.workers.compensation.regression import root_of, spectrum
from counterweight.workers.matrix_flops import Work
from counterweight.workers.quantization.target import right_divide
from tests.flop_counter import counted, deviations


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def near(planned: Work, executed: Work) -> None:
    assert deviations(planned, executed, exact=0.01, entries=1.0) == {}
    assert planned.total > 0


def test_work_adds_and_multiplies_kind_by_kind() -> None:
    one = Work(products32=1, products64=2, factorizations=3, elementwise=4)
    assert one + one == one * 2
    assert (one * 2).total == 20
    assert (one + matrix_flops.elementwise(0.6)).total == 11


@pytest.mark.parametrize("width", [32, TRIANGLE_BLOCK, 3 * TRIANGLE_BLOCK])
def test_a_gram_matrix_is_its_triangle_and_the_rest_of_its_strips(width: int) -> None:
    assert matrix_bytes.TRIANGLE_BLOCK == TRIANGLE_BLOCK
    x = draw(200, width, dtype=torch.float32)
    near(matrix_flops.gram(200, width, TRIANGLE_BLOCK), counted(lambda: ShardMoments.of(x)))


@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (96, 40)])
def test_a_spectrum_takes_the_smaller_gram_matrix(rows: int, columns: int) -> None:
    near(matrix_flops.spectrum(rows, columns), counted(lambda: spectrum(draw(rows, columns))))


@pytest.mark.parametrize("tokens", [40, 200])
def test_a_root_is_choleskys_where_there_is_one(tokens: int) -> None:
    x = draw(tokens, 80)
    gram = x.T @ x
    near(matrix_flops.root(80, definite=tokens >= 80), counted(lambda: root_of(gram)))


def test_a_regression_is_a_factor_and_two_triangular_solves() -> None:
    x = draw(200, 80)
    gram = x.T @ x
    near(matrix_flops.right_divide(30, 80), counted(lambda: right_divide(draw(30, 80), gram, 0.01)))


def test_singular_vectors_cost_the_same_for_a_matrix_and_its_transpose() -> None:
    for shape in ((40, 96), (96, 40)):
        near(matrix_flops.svd(*shape), counted(lambda shape=shape: torch.linalg.svd(draw(*shape), full_matrices=False)))


@pytest.mark.parametrize("size", [64, 96, 28 << 5, 46])
def test_a_fast_transform_is_a_product_for_each_factor(size: int) -> None:
    transform = Hadamard(size=size, seed=1)
    for dtype, count in ((torch.float32, matrix_flops.hadamard), (torch.float64, matrix_flops.hadamard64)):
        x = draw(20, size, dtype=dtype)
        transform.apply(x)  # the factors are made once
        near(count(20 * size, size), counted(lambda x=x: transform.apply(x)))


def test_constants_of_factorizations_are_the_textbooks() -> None:
    """Leading terms: n^3/3, 2 n^2 k, 9 n^3, 4 m n^2 - 4/3 n^3, 6 m n^2 + 20 n^3."""
    assert matrix_flops.cholesky(30).factorizations == 9000
    assert matrix_flops.solve(30, 7).factorizations == 2 * 900 * 7
    assert matrix_flops.eigh(30).decompositions == 9 * 27000
    assert matrix_flops.qr(30, 30).factorizations == pytest.approx(8 / 3 * 27000)
    assert matrix_flops.svd(50, 30).decompositions == 6 * 50 * 900 + 20 * 27000


def test_the_counter_agrees_with_torchs_own_on_products() -> None:
    def products() -> Tensor:
        x = draw(2, 4, 32, 16, dtype=torch.float32)
        mixed = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return (
            torch.addmm(draw(8, 8), draw(8, 30), draw(30, 8)).sum() + (mixed.flatten(2) @ draw(512, 64).float()).sum()
        )

    # Which does not know attention's fused kernel on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        products()
    work = counted(products)
    assert work.products32 + work.products64 == torchs.get_total_flops()
