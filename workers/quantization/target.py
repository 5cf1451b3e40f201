"""What the codes of a layer are to reproduce, when their input is not the one the weight was made for.

A layer's integer weight sees y, a noisy version of the input: quantized, made by compressed blocks, or both. With t the
input in the original model and a branch L on the unquantized x, the dense matrix Z with the least ||W t - L x - Z y||^2 is

    Z = (W E[t y^T] - L E[x y^T]) E[y y^T]^-1.

That is Update-Quant of LRC (Scetbon & Hensman 2024) and, without a branch, the asymmetric calibration of GPTAQ (Li et al.
2025) and QEP (Arai & Ichikawa 2025). Least squares shrinks what noise blurs (attenuation): the layer's error is the least
that a dense matrix can have, but E||Z y||^2 is at most E||W t - L x||^2, layer after layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.matrix_flops import solves_in_single


def regressed(
    weight: Tensor, statistics: InputStatistics, branch: Tensor | None, *, share: float, damping: float
) -> Tensor:
    """The matrix [out, in] that the codes are to reproduce, in the weight's dtype; computed in float64.

    branch: the low-rank product [out, in] that stands beside the codes. share: of the regressed target, the rest is the
    plain one. damping: of the regression, see `right_divide`.
    """
    rest = weight if branch is None else weight - branch
    products = weight.double() @ statistics.product("ty")
    if branch is not None:
        products = products - branch.double() @ statistics.product("xy")
    solution = right_divide(products, statistics.product("yy"), damping)
    mixed: Tensor = (1 - share) * rest.double() + share * solution
    return mixed.to(weight.dtype)


def damped(gram: Tensor, share: float) -> Tensor:
    """gram [in, in] with `share` of its mean diagonal added to the diagonal, as a new tensor."""
    result = gram.clone()
    result.diagonal().add_(share * gram.diagonal().mean())
    return result


def right_divide(products: Tensor, gram: Tensor, damping: float) -> Tensor:
    """products (gram + damping * mean diagonal)^-1 for a symmetric, semidefinite gram [in, in] float64. Factorized in float64,
    solved in the dtype of `products`, see `solving_dtype`."""
    return divider(gram, damping)(products)


def divider(gram: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """`right_divide` of several by one gram, which is factorized once."""
    regular = damped(gram, damping)
    root, failed = torch.linalg.cholesky_ex(regular)
    if int(failed):
        inverse: Tensor = torch.linalg.pinv(regular, hermitian=True)
        return lambda products: products @ inverse.to(products.dtype)

    def divide(products: Tensor) -> Tensor:
        solved: Tensor = torch.cholesky_solve(products.T, root.to(products.dtype))
        return solved.T

    return divide


def solving_dtype(width: int, damping: float) -> torch.dtype:
    """In which a Gram matrix [width, width] that is damped by this share is solved with."""
    return torch.float32 if solves_in_single(width, damping) else torch.float64
