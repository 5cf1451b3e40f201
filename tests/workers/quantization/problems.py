"""Layers with correlated inputs, their output error in float64, and references that share no code with the solvers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.calibration.statistics import InputStatistics


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(rows: int, columns: int, seed: int = 0, tokens: int = 512) -> tuple[Tensor, InputStatistics]:
    """A weight and the statistics of inputs whose channels are correlated and differ in power by two decades."""
    source = generator(seed)
    mixing = torch.randn(columns, columns, generator=source) + 2 * torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=source) @ mixing
    inputs *= torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=source)].sqrt()
    return torch.randn(rows, columns, generator=source), of(inputs)


def of(inputs: Tensor) -> InputStatistics:
    return InputStatistics(gram=inputs.double().T @ inputs.double(), tokens=len(inputs))


def loss(weight: Tensor, solved: UniformWeight, statistics: InputStatistics) -> float:
    """||(W - Q) X||^2 per token, float64."""
    return row_losses(weight, solved, statistics).sum().item()


def row_losses(weight: Tensor, solved: UniformWeight, statistics: InputStatistics) -> Tensor:
    error = weight.double() - solved.dequantize(torch.float64)
    return ((error @ statistics.mean_gram()) * error).sum(1)


def damped(statistics: InputStatistics, damping: float) -> Tensor:
    """The Hessian that the solver is asked to use: damping relative to the median power."""
    hessian = statistics.mean_gram()
    return hessian + damping * hessian.diagonal().median() * torch.eye(len(hessian), dtype=torch.float64)


def best_of_all(weight: Tensor, solved: UniformWeight, statistics: InputStatistics) -> Tensor:
    """The smallest loss of each row that any codes on the grid of `solved` reach, by trying all of them."""
    half = 1 << (solved.bits - 1)
    columns = weight.shape[1]
    every = torch.tensor(list(itertools.product(range(-half, half), repeat=columns)), dtype=torch.int8)
    best = []
    for row in range(len(weight)):
        candidate = UniformWeight(
            codes=every,
            scale=solved.scale[row].expand(len(every), -1),
            zero_point=None if solved.zero_point is None else solved.zero_point[row].expand(len(every), -1),
            bits=solved.bits,
            group_size=solved.group_size,
        )
        best.append(row_losses(weight[row].expand(len(every), -1), candidate, statistics).min())
    return torch.stack(best)


def optimal_brain_codes(weight: Tensor, solved: UniformWeight, hessian: Tensor, order: list[int]) -> Tensor:
    """Codes by Optimal Brain Surgeon, one column at a time in float64, with the explicit inverse of what is left.

    Frantar et al. 2022, equations 2 and 3: after each column all remaining weights take their best values, and the
    inverse Hessian loses the column by Gaussian elimination.
    """
    half = 1 << (solved.bits - 1)
    width = solved.group_size or weight.shape[1]
    work, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for j in order:
        scale = solved.scale[:, j // width].double()
        zero = 0 if solved.zero_point is None else solved.zero_point[:, j // width].double()
        code = (work[:, j] / scale + zero).round().clamp(-half, half - 1)
        error = (work[:, j] - (code - zero) * scale) / inverse[j, j]
        work -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        codes[:, j] = code.to(torch.int8)
        inverse[j, j] = 1  # never used again; keeps the matrix regular
    return codes
