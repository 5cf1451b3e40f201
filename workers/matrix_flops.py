"""Floating-point operations of the steps that solvers are made of, by kind: machines do each kind at a rate of its own.

Torch-free, so that a plan can ask. Counts are the textbooks': a multiplication and an addition are two operations, and terms of
lower order are left out. Those of Cholesky, QR and triangular solves are what LAPACK does (Blackford & Dongarra, LAPACK Working
Note 41, 1999, appendix C; Golub & Van Loan, "Matrix Computations", 4th ed., sections 4.2 and 5.2). Those of eigen- and singular
value decompositions are nominal: both iterate, and divide and conquer skips what deflates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from counterweight.kernels.hadamard_orders import factor_sizes, largest_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations. products32, products64: of matrix products in float32 (or in fewer bits) and in float64. grams32: of x^T x,
    half of a product, likewise. factorizations: that end after a fixed number of steps (Cholesky, QR), with the triangular
    solves behind them, mostly in float64. decompositions: that iterate (eigenvalues, singular values). elementwise: on each
    entry of a matrix, sums over entries included.

    steps: operations of torch that wait for each other and are started one by one, whatever their size; no part of `total`.
    Counted where they are many: columns of a weight, experts of a block.
    """

    products32: float = 0
    grams32: float = 0
    products64: float = 0
    factorizations: float = 0
    decompositions: float = 0
    elementwise: float = 0
    steps: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            products32=self.products32 + other.products32,
            grams32=self.grams32 + other.grams32,
            products64=self.products64 + other.products64,
            factorizations=self.factorizations + other.factorizations,
            decompositions=self.decompositions + other.decompositions,
            elementwise=self.elementwise + other.elementwise,
            steps=self.steps + other.steps,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            products32=self.products32 * times,
            grams32=self.grams32 * times,
            products64=self.products64 * times,
            factorizations=self.factorizations * times,
            decompositions=self.decompositions * times,
            elementwise=self.elementwise * times,
            steps=self.steps * times,
        )

    @property
    def total(self) -> int:
        products = self.products32 + self.grams32 + self.products64
        return round(products + self.factorizations + self.decompositions + self.elementwise)


NOTHING = Work()


def elementwise(operations: float) -> Work:
    """So many operations on entries."""
    return Work(elementwise=operations)


def steps(count: float) -> Work:
    """So many operations that wait for each other, see `Work`."""
    return Work(steps=count)


def product(rows: float, inner: float, columns: float) -> Work:
    """[rows, inner] times [inner, columns] in float32."""
    return Work(products32=2 * rows * inner * columns)


def product64(rows: float, inner: float, columns: float) -> Work:
    """[rows, inner] times [inner, columns] in float64."""
    return Work(products64=2 * rows * inner * columns)


def gram(tokens: float, width: int, strip: int) -> Work:
    """The lower triangle of x^T x for x [tokens, width] float32, by strips of `strip` columns: the last entries of a strip lie
    beyond the diagonal."""
    return Work(grams32=tokens * width * (width + min(strip, width)))


BLOCK_LEAST, BLOCKS = 128, 8
"""Of `workers.blocked`: rows of a block at least, and blocks of a wide matrix. Few, because a GPU wants large products."""


def block_of(size: int) -> int:
    """Rows of a block of a matrix of so many."""
    return max(BLOCK_LEAST, -(-size // BLOCKS))


def _in_blocks(size: int) -> float:
    """The sum of the squares of the sizes of the blocks."""
    block = block_of(size)
    return size // block * block**2 + (size % block) ** 2


def symmetric_product(size: int, inner: float) -> Work:
    """[size, inner] times [inner, size] in float32 where that is symmetric."""
    corners = _in_blocks(size)
    return Work(products32=inner * (size**2 + corners), elementwise=corners)


def cholesky(size: float) -> Work:
    """The factor of [size, size]."""
    return Work(factorizations=size**3 / 3)


def solve(size: float, right_sides: float) -> Work:
    """The two triangular solves behind Cholesky's factor, [size, size]."""
    return Work(factorizations=2 * size**2 * right_sides)


def triangular(size: float, right_sides: float) -> Work:
    """One triangular solve, [size, size]."""
    return Work(factorizations=size**2 * right_sides)


def eigh(size: float) -> Work:
    """Eigenvalues and vectors of a symmetric [size, size]: nominally 9 n^3, the symmetric QR algorithm's (Golub & Van Loan,
    section 8.3.5). LAPACK's divide and conquer takes from about 4 n^3 to that."""
    return Work(decompositions=9 * size**3)


def qr(rows: float, columns: float) -> Work:
    """Orthonormal columns Q [rows, columns] and their triangle, rows >= columns: Householder's, and Q written out."""
    return Work(factorizations=4 * rows * columns**2 - 4 / 3 * columns**3)


def svd(rows: float, columns: float) -> Work:
    """The thin singular value decomposition of [rows, columns], vectors on both sides: nominally 6 m n^2 + 20 n^3 with m >= n
    (R-SVD, Golub & Van Loan, section 8.6.3)."""
    larger, smaller = max(rows, columns), min(rows, columns)
    return Work(decompositions=6 * larger * smaller**2 + 20 * smaller**3)


def root(size: int, *, definite: bool) -> Work:
    """A root of a Gram matrix [size, size]: Cholesky's factor; where it is not positive definite, the eigenvectors too. An
    attempt that fails stops on its way and is counted whole."""
    return cholesky(size) if definite else cholesky(size) + eigh(size) + elementwise(size**2)


def right_divide(rows: float, size: float) -> Work:
    """[rows, size] times the inverse of a damped [size, size] matrix, float64."""
    return cholesky(size) + solve(size, rows)


CONDITION = 1e7
"""Of a damped Gram matrix, up to which float32 solves with its float64 factor: that of the factor is the root of it, 3e3,
which leaves four digits of seven."""


def solves_in_single(width: int, damping: float) -> bool:
    """Whether a Gram matrix [width, width] with this share of its mean diagonal on the diagonal is solved with in float32: its
    largest eigenvalue is at most its trace, so its condition number at most width / damping."""
    return width <= CONDITION * damping


def spectrum(rows: int, columns: int) -> Work:
    """Singular values and left vectors of [rows, columns] float64 by way of the smaller Gram matrix, that matrix included."""
    smaller = min(rows, columns)
    found = product64(smaller, max(rows, columns), smaller) + eigh(smaller)
    # The product with the right vectors, and its orthonormal columns.
    return found if rows <= columns else found + product64(rows, columns, columns) + qr(rows, columns)


RANGE_PRODUCTS = 16
"""Products with M G M^T, or the other square, that the range finder takes at most: see `compensation.range_finder`."""
RANGE_DEGREE = 5
"""Of its filters at most."""
RANGE_LEAST = 512
"""Rows and columns from which the range finder is taken. Below, the whole spectrum takes less than a second."""


Side = Literal["factors", "left", "right"]
"""Of the range finder, see `range_side`."""

RANGE_PLANNED: Mapping[Side, int] = {"factors": 12, "left": 10, "right": 14}
"""Products that a plan counts, with two filters. At least what matrices of independent entries take: 8 to 10 where the square
is multiplied out, which tells more of what may be missing, and up to 14 of tall ones, whose spectrum is flatter; spectra that
decay take 2 to 7, clusters at the rank all products."""

ASKED = 4096
"""Answers that are kept: a plan asks the same of each of thousands of experts."""


def range_columns(rank: int) -> int:
    """Columns of the range finder's basis: the rank, and an oversampling."""
    return rank + max(16, rank // 8)


@lru_cache(maxsize=ASKED)
def range_side(rows: int, columns: int, rank: int, *, metric: bool) -> Side:
    """What the range finder multiplies by, with A = M G^(1/2), M [rows, columns]: `left`: A A^T as one matrix; `right`: A^T A
    as one, of a tall M; `factors`: those of A A^T in turn. What is least work."""
    sides: tuple[Side, ...] = ("factors", "left", "right") if rows > columns else ("factors", "left")
    return min(sides, key=lambda side: _ranged(rows, columns, rank, metric, side).total)


@lru_cache(maxsize=ASKED)
def finds_range(rows: int, columns: int, rank: int, *, metric: bool) -> bool:
    """Whether the range finder is taken for `rank` leading directions of M G^(1/2), M [rows, columns]: where they are few and
    it is less work than the whole spectrum. metric: whether there is a G."""
    if min(rows, columns) < RANGE_LEAST or rank > min(rows, columns) // 4:
        return False
    return range_finder(rows, columns, rank, metric=metric).total < exact(rows, columns, definite=metric or None).total


def range_finder(rows: int, columns: int, rank: int, *, metric: bool) -> Work:
    """`rank` leading directions by the range finder."""
    return _ranged(rows, columns, rank, metric, range_side(rows, columns, rank, metric=metric))


def _ranged(rows: int, columns: int, rank: int, metric: bool, side: Side) -> Work:
    """The same by way of one `Side`."""
    count, made, taken = range_columns(rank), 3, RANGE_PLANNED[side]
    size, formed, ends = rows, NOTHING, NOTHING
    if side == "factors":
        one = product(rows, columns, count) * 2 + product(columns, columns, count) * metric
    elif side == "left":
        formed = symmetric_product(rows, columns) + product(rows, columns, columns) * metric
        one = product(rows, rows, count)
    else:
        size, formed = columns, symmetric_product(columns, rows)
        if metric:
            formed += cholesky(columns) + product(columns, columns, columns) + symmetric_product(columns, columns)
        one = product(columns, columns, count)
        # Left vectors of the right ones.
        ends = product(rows, columns, rank) + product(columns, columns, rank) * metric + qr(rows, rank)
    turned = product64(count, size, count) + eigh(count) + product64(size, count, count) * 2
    bases = (qr(size, count) + turned) * made + elementwise(4 * size * count * (taken + made))
    return formed + one * taken + bases + ends


def exact(rows: int, columns: int, *, definite: bool | None) -> Work:
    """The whole spectrum of M G^(1/2), with the root of G; definite: of G, None where there is none."""
    found = spectrum(rows, columns)
    return found if definite is None else found + root(columns, definite=definite) + product64(rows, columns, columns)


def directions(rows: int, columns: int, rank: int | None, *, definite: bool | None) -> Work:
    """The leading directions of M G^(1/2), as `compensation.regression.directions` finds them. rank: None where the spectrum
    decides it."""
    if rank is not None and finds_range(rows, columns, rank, metric=definite is not None):
        return range_finder(rows, columns, rank, metric=definite is not None)
    return exact(rows, columns, definite=definite)


def trace(rows: int, columns: int) -> Work:
    """tr(A G B^T) of float32 matrices [rows, columns] and a Gram matrix G."""
    return product(rows, columns, columns) + elementwise(2 * rows * columns)


def square_trace(rows: int, columns: int) -> Work:
    """tr(A G A^T) of a float32 matrix [rows, columns] and a symmetric Gram matrix G, by blocks of its lower triangle."""
    corners = _in_blocks(columns)
    work = Work(products32=rows * (columns**2 + corners))
    return work + elementwise(2 * rows * columns + (columns**2 - corners) / 2)


def square_trace64(rows: int, columns: int) -> Work:
    """The same in float64."""
    single = square_trace(rows, columns)
    return Work(products64=single.products32, elementwise=single.elementwise)


def branch_terms(rows: int, columns: int, rank: int, streams: int) -> Work:
    """What a branch of this rank adds to the error of a layer whose `streams` differ, through its small factors, in float32."""
    # What it reads of each stream; of what two terms make of it, and of itself.
    read = product(rank, columns, columns) * streams + product(rank, columns, rows) * 2 + product(rank, columns, rank)
    return read + product(rank, rows, rank)


def branch_terms64(rows: int, columns: int, rank: int, streams: int) -> Work:
    """The same in float64."""
    return Work(products64=branch_terms(rows, columns, rank, streams).products32)


def hadamard(elements: float, size: int) -> Work:
    """A fast Hadamard transform of order `size` on `elements` numbers, in float32: a small product for each of its factors,
    and the scale."""
    return Work(products32=2 * elements * sum(factor_sizes(largest_order(size))), elementwise=elements)


def hadamard64(elements: float, size: int) -> Work:
    """The same in float64."""
    single = hadamard(elements, size)
    return Work(products64=single.products32, elementwise=single.elementwise)
