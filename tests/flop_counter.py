"""Floating-point operations of what torch really executes, counted from the shapes of its operations.

Independent of `workers.matrix_flops`: the operations are those that torch dispatches, the constants the textbooks'. Copies are
none; an operation on entries is one for each entry of its largest tensor of floating-point numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counterweight.workers.matrix_flops import Work

Count = Callable[[list[Size]], float]
"""Shapes of an operation's tensors -> how many operations it is."""

PRODUCTS: Mapping[str, Count] = {
    "mm": lambda s: 2 * prod(s[0]) * s[1][1],
    "bmm": lambda s: 2 * prod(s[0]) * s[1][2],
    "mv": lambda s: 2 * prod(s[0]),
    "addmm": lambda s: 2 * prod(s[1]) * s[2][1],
    "addmm_": lambda s: 2 * prod(s[1]) * s[2][1],
    "addr_": lambda s: 2 * prod(s[0]),
    # Scores, and the values that they mix. Backward: the scores again, and a gradient for each factor of both products.
    "_scaled_dot_product_flash_attention_for_cpu": lambda s: 4 * prod(s[0]) * s[1][2],
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda s: 10 * prod(s[1]) * s[2][2],
}
FACTORIZATIONS: Mapping[str, Count] = {
    "linalg_cholesky_ex": lambda s: s[0][0] ** 3 / 3,
    "cholesky_solve": lambda s: 2 * s[1][0] ** 2 * s[0][1],
    "_cholesky_solve_helper": lambda s: 2 * s[1][0] ** 2 * s[0][1],
    "linalg_solve_triangular": lambda s: s[0][0] * prod(s[1]),
    "linalg_qr": lambda s: 4 * s[0][0] * s[0][1] ** 2 - 4 / 3 * s[0][1] ** 3,
}
DECOMPOSITIONS: Mapping[str, Count] = {
    "_linalg_eigh": lambda s: 9 * s[0][0] ** 3,
    "_linalg_svd": lambda s: 6 * max(s[0]) * min(s[0]) ** 2 + 20 * min(s[0]) ** 3,
}
TWICE = {"addcmul", "addcmul_", "addcdiv", "addcdiv_"}
UNTAGGED = {"abs_"}
"""On entries, though torch does not tag them so."""
COPIES = {"clone", "fill", "fill_", "zero_", "copy", "copy_", "detach", "_to_copy"}


class FlopCounter(TorchDispatchMode):
    """Counts what the thread that enters it executes. work: by kind."""

    def __init__(self) -> None:
        super().__init__()
        self._found: Counter[str] = Counter()

    @property
    def work(self) -> Work:
        return Work(**self._found)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        shapes = [tensor.shape for tensor in given]
        if name in PRODUCTS:
            self._found["products64" if given[0].dtype == torch.float64 else "products32"] += round(
                PRODUCTS[name](shapes)
            )
        elif name in FACTORIZATIONS:
            self._found["factorizations"] += round(FACTORIZATIONS[name](shapes))
        elif name in DECOMPOSITIONS:
            self._found["decompositions"] += round(DECOMPOSITIONS[name](shapes))
        elif name in UNTAGGED or ({torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags) and name not in COPIES):
            tensors = [t for t in (*given, *tree_leaves(out)) if isinstance(t, Tensor) and t.is_floating_point()]
            largest = max((tensor.numel() for tensor in tensors), default=0)
            self._found["elementwise"] += largest * (2 if name in TWICE else 1)
        return out


def counted(run: Callable[[], object]) -> Work:
    """What `run` executes."""
    with FlopCounter() as counter:
        run()
    return counter.work


def deviations(planned: Work, executed: Work, *, exact: float, entries: float) -> dict[str, float]:
    """Kinds in which `planned` is off, and by what share: products and factorizations by more than `exact`, what is done on
    entries by more than `entries`. A product of x^T x is a product for the counter, and it knows of no steps."""
    planned = replace(planned, products32=planned.products32 + planned.grams32)
    found = {}
    for kind, allowed in {
        "products32": exact,
        "products64": exact,
        "factorizations": exact,
        "decompositions": exact,
        "elementwise": entries,
    }.items():
        one, other = getattr(planned, kind), getattr(executed, kind)
        off = abs(one - other) / other if other else float(one > 0)
        if off > allowed:
            found[kind] = off
    return found
