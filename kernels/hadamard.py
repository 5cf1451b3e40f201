"""Hadamard transforms of any width, as a value that says which one and applies it fast.

A Hadamard matrix of order n has entries +-1 and orthogonal rows; divided by sqrt(n) it is an orthogonal matrix that
spreads a single large channel evenly over all n. Orders are generated, not tabulated:

- Sylvester (1867): 2**p, the p-th Kronecker power of [[1, 1], [1, -1]];
- Paley I and II (1933): q + 1 for q = 3 mod 4 and 2 (q + 1) for q = 1 mod 4, from the squares of the field with q
  elements, q a power of a prime;
- core * 2**p, the Kronecker product of a Paley matrix (the core) and Sylvester's.

A width that is none of these gets equal blocks of the largest order that divides it: 92 is 23 blocks of 4.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from counterweight.kernels.hadamard_orders import factor_sizes, largest_order, paley_field


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """The orthogonal transform x -> x (D H (x) I): H is `hadamard_matrix(size)`, D = diag(`signs`), (x) Kronecker's product.

    size: the order of H. seed: of the random signs, None for none. inner: the order of I, neighbouring channels that are
    not mixed; to mix heads and not the channels within them, size is their number and inner their width. Raises
    ValueError for a size or an inner below 1.
    """

    size: int
    seed: int | None = None
    inner: int = 1

    def __post_init__(self) -> None:
        for field, value in (("size", self.size), ("inner", self.inner)):
            if value < 1:
                raise ValueError(f"{field}: {value}: expected at least 1")

    @property
    def width(self) -> int:
        """Channels of the x that this applies to."""
        return self.size * self.inner

    @property
    def order(self) -> int:
        """Order of the Hadamard matrices on the diagonal of H: `size` where one of that order is known."""
        return largest_order(self.size)

    @property
    def signs(self) -> Tensor | None:
        """Random signs [size] float64, the same on every machine; None without a seed."""
        if self.seed is None:
            return None
        stream = hashlib.shake_256(f"hadamard {self.size} {self.seed}".encode()).digest(-(-self.size // 8))
        bits = [stream[index // 8] >> index % 8 & 1 for index in range(self.size)]
        return 1 - 2 * torch.tensor(bits, dtype=torch.float64)

    def apply(self, x: Tensor) -> Tensor:
        """x [..., width] of any float dtype -> x transformed, of the same shape and dtype.

        Computed in float32, or float64 for an x of float64. Raises ValueError for another width.
        """
        if x.shape[-1] != self.width:
            raise ValueError(f"x: {list(x.shape)}: expected {self.width} channels")
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if (signs := self.signs) is not None:
            y = y * signs.repeat_interleave(self.inner).to(y)
        # One small dense product for each Kronecker factor, along its own axis of x, outermost factor first.
        stride = self.order * self.inner
        for factor in _factors(self.order, y.dtype, y.device):
            stride //= len(factor)
            y = y.reshape(x.numel() // (len(factor) * stride), len(factor), stride)
            y = y.flatten(1) @ factor if stride == 1 else factor.T @ y
        return (y / math.sqrt(self.order)).reshape(x.shape).to(x.dtype)

    def dense(self) -> Tensor:
        """The transform as an orthogonal matrix [width, width] float64: apply(x) = x @ dense()."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


def hadamard_matrix(n: int) -> Tensor:
    """An orthogonal matrix [n, n] float64 of equal blocks, whose entries are +-1/sqrt(order of a block).

    It is one block wherever this module can construct a Hadamard matrix of order n. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n: {n}: expected at least 1")
    order = largest_order(n)
    block = torch.ones(1, 1, dtype=torch.float64)
    for factor in _factors(order, block.dtype, block.device):
        block = torch.kron(block, factor)
    return torch.kron(torch.eye(n // order, dtype=torch.float64), block / math.sqrt(order))


@cache
def _factors(order: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Matrices of +-1 whose Kronecker product is the Hadamard matrix of `order`, made once."""
    factors = [_paley(*field) if (field := paley_field(size)) else _sylvester(size) for size in factor_sizes(order)]
    return tuple(factor.to(device, dtype) for factor in factors)


def _sylvester(order: int) -> Tensor:
    """Sylvester's matrix [order, order] int8, of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8))
    return matrix


def _paley(p: int, k: int) -> Tensor:
    """Paley's matrix int8, of order q + 1 or 2 (q + 1), q = p**k.

    Both come from a conference matrix C [q + 1, q + 1]: zero diagonal, +-1 elsewhere, C C^T = q I.
    """
    order = p**k + 1
    skew = order % 4 == 0  # -1 is no square of the field
    conference = torch.zeros(order, order, dtype=torch.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if skew else 1
    conference[1:, 1:] = _jacobsthal(p, k)
    identity = torch.eye(order, dtype=torch.int8)
    if skew:
        return conference + identity
    on_signs = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    on_zeros = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, on_signs) + torch.kron(identity, on_zeros)


def _jacobsthal(p: int, k: int) -> Tensor:
    """Q [q, q] int8 for the field with q = p**k elements: Q_ab = 1 where a - b is a square, -1 where not, 0 for a = b.

    Elements are polynomials in x of degree < k with coefficients mod p. Where x has q - 1 different powers, they are all
    the elements but zero, and the even powers are the squares.
    """
    q = p**k
    place = p ** torch.arange(k)
    for reduction in itertools.product(range(p), repeat=k):  # x**k is the polynomial with these coefficients
        powers = list(itertools.islice(_powers_of_x(reduction, p), q))
        if len(powers) == q - 1:
            break
    character = torch.zeros(q, dtype=torch.int8)
    character[(torch.tensor(powers) * place).sum(1)] = torch.tensor([1, -1], dtype=torch.int8).repeat(q // 2)
    elements = torch.arange(q).unsqueeze(1) // place % p
    return character[((elements.unsqueeze(1) - elements) % p * place).sum(2)]


def _powers_of_x(reduction: tuple[int, ...], p: int) -> Iterator[tuple[int, ...]]:
    """1, x, x**2, ... as coefficients, lowest first, until the next is 1 again; without end when none is."""
    one = power = (1, *(0 for _ in reduction[1:]))
    while True:
        yield power
        shifted, top = (0, *power[:-1]), power[-1]
        power = tuple((low + top * coefficient) % p for low, coefficient in zip(shifted, reduction, strict=True))
        if power == one:
            return
