"""Memory of the operations that solvers are made of, in bytes: torch's and LAPACK's own copies and workspaces.

Torch-free, so that a plan can ask. What goes in is counted by whoever holds it; what comes out is counted here.
"""

from __future__ import annotations

from functools import cache

from counterweight.workers import matrix_flops

HALF, SINGLE, DOUBLE = 2, 4, 8
"""Of an element in 16 bits, in float32 and in float64."""

DECODE = 3 * SINGLE
"""Of a weight while a stored one is read back: codes, scales and products in float32. One of the three stays."""


TRIANGLE_BLOCK = 128  # of calibration/triangle.py, which imports torch


@cache  # a plan asks it of each expert
def triangle(size: int) -> int:
    """Elements of a symmetric [size, size] matrix that is held by the strips of its lower triangle."""
    strips = ((start, min(start + TRIANGLE_BLOCK, size)) for start in range(0, size, TRIANGLE_BLOCK))
    return sum((stop - start) * stop for start, stop in strips)


def cholesky(size: int) -> int:
    """`torch.linalg.cholesky_ex` of [size, size] float64: the factor."""
    return DOUBLE * size * size


def eigh(size: int) -> int:
    """`torch.linalg.eigh` of [size, size] float64: the vectors, and LAPACK's workspace for divide and conquer."""
    return 3 * DOUBLE * size * size


def root(size: int, tokens: float) -> int:
    """A root of the Gram matrix of `tokens` rows: of fewer rows than columns Cholesky finds none, whose attempt is still there
    when the eigenvectors are found."""
    factor = cholesky(size)
    return factor if tokens >= size else DOUBLE * size * size + eigh(size)


def right_divide(rows: int, size: int) -> int:
    """[rows, size] times the inverse of a damped [size, size] matrix, float64: the damped copy, its factor, LAPACK's own
    copy of that and the solution."""
    return DOUBLE * size * size + 2 * cholesky(size) + DOUBLE * rows * size


def spectrum(rows: int, columns: int) -> int:
    """Singular values and left vectors of [rows, columns] float64 by way of the smaller Gram matrix, that matrix included."""
    smaller = min(rows, columns)
    found = DOUBLE * smaller * smaller + eigh(smaller)
    if rows <= columns:
        return found
    # The product with the right vectors, its orthonormal columns and their triangle.
    return max(found, 3 * DOUBLE * columns * columns + 2 * DOUBLE * rows * columns)


def range_finder(rows: int, columns: int, rank: int, *, metric: bool) -> int:
    """Leading directions of [rows, columns] float64 by the range finder. metric: whether a Gram matrix stands behind."""
    count, side = matrix_flops.range_columns(rank), matrix_flops.range_side(rows, columns, rank, metric=metric)
    size, square = columns if side == "right" else rows, SINGLE * columns * columns
    # In float32, what is multiplied; it may be multiplied out first.
    single = SINGLE * rows * columns + square * metric
    formed = {
        "factors": 0,
        "left": SINGLE * (rows * rows + rows * columns * metric),
        "right": square * (1 + 2 * metric),
    }
    kept = SINGLE * size * size * (side != "factors")
    # The basis, its image and what both become, two steps of a filter; and a block on its way through the factors.
    basis = 6 * DOUBLE * size * count + 2 * SINGLE * columns * count
    # The right side begins with the root in float64, and ends with left vectors and their orthonormal basis.
    begun, ended = (cholesky(columns) * metric, 4 * DOUBLE * rows * rank) if side == "right" else (0, 0)
    return single + max(begun, formed[side], kept + basis, ended)


def directions(rows: int, columns: int, rank: int | None, tokens: float) -> int:
    """Leading directions of a matrix [rows, columns] behind a root of the metric of `tokens` rows, both float64 and given, as
    `compensation.regression.directions` finds them. rank: None where the spectrum decides it."""
    if rank is not None and matrix_flops.finds_range(rows, columns, rank, metric=True):
        return range_finder(rows, columns, rank, metric=True)
    # The root; behind it the matrix, and its spectrum.
    whitened = DOUBLE * rows * columns
    return max(root(columns, tokens), DOUBLE * columns * columns + whitened, whitened + spectrum(rows, columns))


def trace(rows: int, columns: int) -> int:
    """tr(A G B^T) of float32 matrices [rows, columns] and a float64 G: G in float32 and the product; the sum in float64."""
    return max(SINGLE * columns * columns + SINGLE * rows * columns, (SINGLE + DOUBLE) * rows * columns)


def square_trace(rows: int, columns: int) -> int:
    """tr(A G A^T) of a float32 matrix [rows, columns] and a symmetric G: a block of G's rows in float32; its product, and the
    sum in float64."""
    block = matrix_flops.block_of(columns)
    return SINGLE * block * columns + (SINGLE + DOUBLE) * rows * block
