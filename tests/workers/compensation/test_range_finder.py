"""The range finder's stated error bound, against the exact decomposition in float64, over kinds of spectra."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from counterweight.workers import matrix_flops
from counterweight.workers.compensation.range_finder import CAPTURED, LEFT, ROUNDING, leading
from counterweight.workers.compensation.regression import directions
from counterweight.workers.methods.compensations.rank import CountRank, EnergyRank
from tests.flop_counter import counted

SIZE = 512


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(values: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(draw(len(values), len(values), seed=1)).Q
    return (basis * values) @ basis.T


INDEX = torch.arange(1, SIZE + 1, dtype=torch.float64)

GRAMS: Mapping[str, Callable[[], Tensor | None]] = {
    "identity": lambda: None,
    "decaying": lambda: rotated(1 / INDEX),
    "fast decaying": lambda: rotated(torch.exp(-INDEX / 8)),
    "outliers": lambda: rotated(torch.where(INDEX <= 4, 1e4, 1.0)),
    "ill-conditioned": lambda: rotated(10 ** (-12 * INDEX / SIZE)),
    "of few tokens": lambda: draw(SIZE, 200, seed=2) @ draw(SIZE, 200, seed=2).T,
}
MATRICES: Mapping[str, Callable[[], Tensor]] = {
    "of independent entries": lambda: draw(SIZE, SIZE),
    "flat": lambda: torch.linalg.qr(draw(SIZE, SIZE)).Q,
    "linear": lambda: rotated(1 - INDEX / (SIZE + 1)),
    "clustered": lambda: rotated(torch.where(INDEX <= 64, 1.0, torch.where(INDEX <= 128, 0.99, 0.01))),
    "decaying": lambda: rotated(INDEX**-0.5),
    "wide": lambda: draw(SIZE, SIZE)[:300],
    "of low rank": lambda: draw(SIZE, 20) @ draw(20, SIZE, seed=3),
}


def check(
    matrix: Tensor, gram: Tensor | None, square: Tensor, eigenvalues: Tensor, rank: int, apart: float = 1e-5
) -> None:
    """What the vectors hold of ||A||_F^2, A = matrix gram^(1/2). square: A A^T, with its eigenvalues, ascending; apart: by how
    much the values may be less."""
    values, vectors = leading(matrix, gram, rank)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    held, most, total = (
        float(each)
        for each in (torch.trace(vectors.T @ square @ vectors), eigenvalues[-rank:].sum(), eigenvalues.sum())
    )
    assert held >= (1 - CAPTURED) * most
    assert total - held <= (1 + LEFT) * (total - most) + ROUNDING * total
    assert float(values.square().sum()) == pytest.approx(held, rel=apart)
    assert bool((values.diff() <= 0).all())


def squared(matrix: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """A A^T and its eigenvalues, by all of them in float64."""
    square = matrix @ matrix.T if gram is None else matrix @ gram @ matrix.T
    return square, torch.linalg.eigvalsh(square).clamp_min(0)


@pytest.mark.parametrize("metric", GRAMS)
@pytest.mark.parametrize("kind", MATRICES)
def test_holds_what_the_exact_decomposition_holds(kind: str, metric: str) -> None:
    matrix, gram = MATRICES[kind](), GRAMS[metric]()
    exact = squared(matrix, gram)
    for rank in (32, 51, 128):
        check(matrix, gram, *exact, rank)


@pytest.mark.parametrize("metric", GRAMS)
def test_a_tall_matrix_is_decomposed_by_its_right_side(metric: str) -> None:
    """With the same bound, where the metric has a Cholesky factor and where it has none."""
    gram = GRAMS[metric]()
    matrix = draw(800, SIZE) * torch.linspace(0.2, 2, SIZE, dtype=torch.float64)
    assert matrix_flops.range_side(*matrix.shape, 51, metric=gram is not None) == "right"
    check(matrix, gram, *squared(matrix, gram), 51, apart=CAPTURED)


def test_a_bound_that_a_plain_random_projection_breaks() -> None:
    """So that the test above says something: a range without filters."""
    matrix = MATRICES["of independent entries"]()
    vectors = torch.linalg.qr(matrix @ matrix.T @ draw(SIZE, 32)).Q
    square, values = squared(matrix, None)
    held, most = float(torch.trace(vectors.T @ square @ vectors)), float(values[-32:].sum())
    assert held < (1 - 100 * CAPTURED) * most


def test_has_the_same_bits_again() -> None:
    matrix, gram = draw(SIZE, 256), draw(256, 256) @ draw(256, 256).T
    first, again = leading(matrix, gram, 16), leading(matrix, gram, 16)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_nothing_is_a_range_of_nothing() -> None:
    values, vectors = leading(torch.zeros(64, 96, dtype=torch.float64), None, 4)
    assert not bool(values.any())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64))


def test_is_taken_where_the_rank_is_small_and_known_and_nowhere_else() -> None:
    wide = matrix_flops.RANGE_LEAST
    assert matrix_flops.finds_range(4096, 4096, 32, metric=True)
    assert matrix_flops.finds_range(4096, 4096, 410, metric=True)
    assert matrix_flops.finds_range(wide, wide, 8, metric=False)
    assert not matrix_flops.finds_range(wide - 1, 4096, 8, metric=True)
    assert not matrix_flops.finds_range(4096, 4096, 1025, metric=True)
    matrix = draw(wide, wide)
    few, _ = directions(matrix, None, CountRank(count=8))
    whole, vectors = directions(matrix, None, EnergyRank(energy=0.1))
    assert len(few) == 8
    assert len(whole) == wide
    held = whole.cumsum(0)[vectors.shape[1] - 1]
    assert held >= 0.1 * whole.sum() > held - whole[vectors.shape[1] - 1]


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(512, 512, 32), (512, 640, 100), (1024, 512, 16), (1024, 512, 51)]
)
@pytest.mark.parametrize("metric", [True, False])
def test_computes_at_most_what_is_planned(rows: int, columns: int, rank: int, metric: bool) -> None:
    """Of a spectrum without outliers; the basis may be made orthonormal once more than the plan says. It ends where a further
    filter would win nothing."""
    matrix, gram = draw(rows, columns), torch.eye(columns, dtype=torch.float64) if metric else None
    executed = counted(lambda: leading(matrix, gram, rank))
    planned = matrix_flops.range_finder(rows, columns, rank, metric=metric)
    assert 0.3 * planned.products32 < executed.products32 < 1.01 * planned.products32
    for kind in ("products64", "factorizations", "decompositions", "elementwise"):
        assert getattr(executed, kind) < 1.4 * getattr(planned, kind)
