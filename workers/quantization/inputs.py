"""What every solver may rely on: a finite matrix, and finite statistics of its own input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.errors import RequestError


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without a copy of the tensor; an empty tensor's are not."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def check_activations(what: str, tensor: Tensor) -> None:
    """RequestError, naming what they are, for activations that are not finite: the model, not the machine, is to blame."""
    if not all_finite(tensor):
        raise not_finite(what, tensor.dtype)


def not_finite(what: str, dtype: torch.dtype) -> RequestError:
    """What is to be said of activations, computed in `dtype`, that are not finite."""
    kind = str(dtype).removeprefix("torch.")
    return RequestError(
        f"{what} is not finite on the calibration tokens: expected a model whose activations stay within {kind}"
    )


def checked_matrix(name: str, matrix: Tensor) -> Tensor:
    """`matrix` in float32; ValueError with its name unless it is finite, [out, in], with at least one row and column."""
    return checked_matrices(name, matrix.unsqueeze(0)).squeeze(0)


def checked_matrices(name: str, matrices: Tensor) -> Tensor:
    """`matrices` [batch, out, in] in float32, each as `checked_matrix` wants it."""
    if matrices.ndim != 3 or matrices.numel() == 0 or not matrices.is_floating_point():
        kind = str(matrices.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: {kind} {list(matrices.shape[1:])}: expected a floating-point matrix [out, in]")
    if not all_finite(matrices):
        raise ValueError(f"{name}: holds NaN or infinity: expected finite values")
    return matrices.float()


def one_batch(matrices: Sequence[Tensor]) -> Tensor:
    """[batch, out, in] of matrices of one shape, without a copy of a single one."""
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(list(matrices))


def checked_statistics(statistics: InputStatistics | None, columns: int) -> InputStatistics:
    """`statistics` when they are finite and of an input of width `columns`; ValueError otherwise."""
    if statistics is None or statistics.gram is None:
        raise ValueError("statistics: none: expected those of the layer's input")
    if statistics.width != columns:
        raise ValueError(f"statistics: width {statistics.width}: expected {columns}, the weight's input columns")
    if not all_finite(statistics.gram):
        raise ValueError("statistics: the Gram matrix holds NaN or infinity: expected finite values")
    return statistics
