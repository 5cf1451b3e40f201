"""Orders of Hadamard matrices that can be constructed, and the orders of the factors that a fast transform is made of.

Numbers alone, without torch: who plans asks here what a transform costs. `hadamard` has the constructions.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

LARGEST_CORE = 1024
"""A core is multiplied as a dense matrix, so its order is what an element costs; wider ones are left to blocks."""

_RADIX = 5  # Sylvester's 2**p is applied as factors of at most 2**5: fewer passes than p butterflies


@cache
def largest_order(n: int) -> int:
    """The largest divisor of n that is the order of a matrix that can be constructed."""
    return next(n // blocks for blocks in range(1, n + 1) if n % blocks == 0 and _core(n // blocks))


@cache
def factor_sizes(order: int) -> tuple[int, ...]:
    """Orders of the matrices whose Kronecker product is the Hadamard matrix of `order`, outermost first: the core, where there
    is one, and powers of two."""
    core = _core(order) or 1
    doublings = (order // core).bit_length() - 1
    parts = math.ceil(doublings / _RADIX)
    powers = [doublings // parts + (part < doublings % parts) for part in range(parts)]
    return (*([core] if core > 1 else []), *(1 << power for power in powers))


def paley_field(size: int) -> tuple[int, int] | None:
    """(p, k) of the field with q = p**k elements that makes the factor of this `size`, None for a power of two, which is
    Sylvester's."""
    return None if size & (size - 1) == 0 else _field(size)


@cache
def _core(order: int) -> int | None:
    """The smallest Paley order (or 1) that is `order` up to a power of two; None when there is none."""
    odd = order // (order & -order)
    if odd == 1:
        return 1
    candidates = itertools.takewhile(
        lambda core: core <= min(order, LARGEST_CORE), (odd << p for p in itertools.count(2))
    )
    return next((core for core in candidates if _field(core)), None)


def _field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field with q = p**k elements that gives a Paley matrix of `order`, None when no field does."""
    if order % 4:
        return None
    half = order // 2 - 1
    return _prime_power(order - 1) or (_prime_power(half) if half % 4 == 1 else None)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k, p prime, for an odd q; None when there is none."""
    if q < 3:
        return None
    p = next((divisor for divisor in range(3, math.isqrt(q) + 1, 2) if q % divisor == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None
