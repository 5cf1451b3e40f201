"""Floating-point operations of what torch really executes, counted from the shapes of its operations.

Independent of `workers.matrix_flops`: the operations are those that torch dispatches, the constants the textbooks'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Shapes = list[torch.Size]
PRODUCTS: Mapping[str, Callable[[Shapes], float]] = {
    "mm": lambda s: 2 * prod(s[0]) * s[1][1],
    "bmm": lambda s: 2 * prod(s[0]) * s[1][2],
    "mv": lambda s: 2 * prod(s[0]),
    "dot": lambda s: 2 * prod(s[0]),
    "addmm": lambda s: 2 * prod(s[1]) * s[2][1],
    "addmm_": lambda s: 2 * prod(s[1]) * s[2][1],
    "addr_": lambda s: 2 * prod(s[0]),
    # Scores, and the values that they mix; backward: scores again, gradients of both factors of both products.
    "_scaled_dot_product_flash_attention_for_cpu": lambda s: 4 * prod(s[0]) * s[1][2],
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda s: 10 * prod(s[1]) * s[2][2],
}
FACTORIZATIONS: Mapping[str, Callable[[Shapes], float]] = {
    "linalg_cholesky_ex": lambda s: s[0][0] ** 3 / 3,
    "cholesky_solve": lambda s: 2 * s[1][0] ** 2 * s[0][1],
    "_cholesky_solve_helper": lambda s: 2 * s[1][0] ** 2 * s[0][1],
    "_linalg_eigh": lambda s: 9 * s[0][0] ** 3,
    "linalg_qr": lambda s: 4 * s[0][0] * s[0][1] ** 2 - 4 / 3 * s[0][1] ** 3,
    "_linalg_svd": lambda s: 6 * max(s[0]) * min(s[0]) ** 2 + 20 * min(s[0]) ** 3,
}
TWICE = {"addcmul", "addcmul_", "addcdiv", "addcdiv_"}
UNTAGGED = {"abs_"}  # of one entry at a time, though torch does not say so
COPIES = {"clone", "fill", "fill_", "zero_", "copy", "copy_", "detach", "detach_", "_to_copy"}


class FlopCounter(TorchDispatchMode):
    """found: kind of operation -> how many; the kinds of `Work`. Of one thread: that which enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        shapes = [tensor.shape for tensor in given]
        if name in PRODUCTS:
            self._add(f"products{32 if given[0].itemsize <= 4 else 64}", name, PRODUCTS[name](shapes))
        elif name in FACTORIZATIONS:
            self._add("factorizations", name, FACTORIZATIONS[name](shapes))
        elif name not in COPIES and (name in UNTAGGED or {torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags)):
            tensors = [t for t in (*given, *tree_leaves(out)) if isinstance(t, Tensor) and t.is_floating_point()]
            largest = max((tensor.numel() for tensor in tensors), default=0)
            self._add("elementwise", name, largest * (2 if name in TWICE else 1))
        return out

    def _add(self, kind: str, name: str, operations: float) -> None:
        self.found[kind] += round(operations)
        self.names[f"{kind} {name}"] += round(operations)
