"""The heart of a block task, without files: gather statistics, quantize, compensate, measure.

1. `calibrate` runs the block over its input shards and gathers each distinct input's moments on the way.
2. `compress` solves every linear: codes on a grid (siblings with one recipe in one solve, because they share a Hessian),
   then the low-rank branch on what the codes left, then the error that remains.
3. `install` puts the result into the block, so that it can be run as it will be served.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from kernels.formats import LowRank, QuantizedWeight
from kernels.linear import CompensatedLinear
from workers.architecture import Siblings
from workers.calibration.statistics import Accumulator, InputStatistics, ShardMoments
from workers.compensation import anticipate, compensate
from workers.config import Config
from workers.errors import RequestError
from workers.parallel import OrderedPool
from workers.quantization import quantize
from workers.recipe import ModuleRecipe
from workers.skeleton import Block

PARALLEL_WIDTH = 1024
"""Input columns of the widest layer from which solves run side by side. Below, an operation on one column is so short
that threads wait for the interpreter instead of computing: 768 columns take 0.18 s one by one and 0.16-0.5 s on two threads."""

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedLinear:
    """What became of one linear layer. activation_bits: bits of its input at inference, None when weight-only."""

    weight: QuantizedWeight
    low_rank: LowRank | None
    activation_bits: int | None

    def to(self, device: torch.device) -> CompressedLinear:
        """The same layer on another device."""
        branch = self.low_rank
        return CompressedLinear(
            weight=self.weight.to(device),
            low_rank=None if branch is None else branch.to(device),
            activation_bits=self.activation_bits,
        )


class FallbackReport(Config):
    """A departure from the recipe that was necessary, with its cause; never silent."""

    step: str
    cause: str


class ModuleReport(Config):
    """What one linear layer cost and won.

    error_quantized, error_compensated: ||(W - W') X||^2 / ||W X||^2 over the calibration tokens, before and after the
    low-rank branch; None when no token reached the layer. Bits are of storage, in sum over the layer.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int | None
    rank: int
    tokens: int
    code_bits: int
    scale_bits: int
    factor_bits: int
    error_quantized: float | None
    error_compensated: float | None
    fallbacks: tuple[FallbackReport, ...] = ()
    seconds: float


def calibrate(
    block: Block,
    inputs: Sequence[Callable[[], Tensor]],
    emit: Callable[[Tensor], Output],
    groups: Sequence[Siblings],
    pool: OrderedPool,
) -> tuple[dict[Siblings, InputStatistics], list[Output]]:
    """Runs the block over its inputs and gathers the moments of what enters each of `groups`.

    inputs: one callable per shard that loads its hidden states [sequences, length, hidden]; the shards' number and order
    are part of the result. emit: what to do with a shard's output (write it, drop it). At most `pool.threads` + 1 shards
    are in memory. A non-finite activation is a RequestError that names the group.
    """
    replicas: queue.SimpleQueue[Block] = queue.SimpleQueue()
    for _ in range(pool.threads):
        replicas.put(block.replica())

    def run(load: Callable[[], Tensor]) -> tuple[dict[Siblings, ShardMoments], Output]:
        replica = replicas.get()
        try:
            with _Tap(replica, groups) as tap:
                output = replica.run(load())
            return tap.moments, emit(output)
        finally:
            replicas.put(replica)

    accumulators = {group: _accumulator(block, group) for group in groups}
    outputs: list[Output] = []
    for moments, output in pool.map(run, inputs):
        for group, shard in moments.items():
            accumulators[group].add(shard)
        outputs.append(output)
    statistics = {group: accumulator.result() for group, accumulator in accumulators.items()}
    for group, found in statistics.items():
        if not bool(torch.isfinite(found.gram).all()):
            raise RequestError(f"the input of {group[0]} is not finite on the calibration tokens")
    return statistics, outputs


def compress(
    weights: Mapping[str, Tensor],
    statistics: Mapping[Siblings, InputStatistics],
    recipes: Mapping[str, ModuleRecipe],
    *,
    scale_dtypes: Mapping[str, torch.dtype],
    pool: OrderedPool,
) -> tuple[dict[str, CompressedLinear], list[ModuleReport]]:
    """Every linear that has a recipe, in table order; `statistics` holds an entry for each group among them.

    weights: linear -> weight [out, in] as the source has it; factors are stored in its dtype. scale_dtypes: linear ->
    dtype in which its scales are stored.
    """
    jobs = list(_solves(weights, statistics, recipes, scale_dtypes))
    if forgotten := recipes.keys() - {name for job in jobs for name in job.names}:
        raise ValueError(f"no input statistics of {sorted(forgotten)}: expected those of every linear with a recipe")
    results: dict[str, CompressedLinear] = {}
    reports: list[ModuleReport] = []
    solve = partial(_solve, weights, statistics)
    side_by_side = any(statistics[job.group].width >= PARALLEL_WIDTH for job in jobs)
    for solved in pool.map(solve, jobs) if side_by_side else map(solve, jobs):
        for name, linear, report in solved:
            results[name] = linear
            reports.append(report)
    return results, reports


def install(block: Block, linears: Mapping[str, CompressedLinear], *, compensated: bool = True) -> None:
    """Replaces the block's linears by their compressed selves, with or without the low-rank branch."""
    for name, linear in linears.items():
        original = block.layer.get_submodule(name)
        bias = getattr(original, "bias", None)
        block.replace(
            name,
            CompensatedLinear(
                linear.weight,
                low_rank=linear.low_rank if compensated else None,
                bias=None if bias is None else bias.detach(),
                activation_bits=linear.activation_bits,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    group: Siblings
    names: tuple[str, ...]
    recipe: ModuleRecipe
    scale_dtype: torch.dtype


def _solves(
    weights: Mapping[str, Tensor],
    statistics: Mapping[Siblings, InputStatistics],
    recipes: Mapping[str, ModuleRecipe],
    scale_dtypes: Mapping[str, torch.dtype],
) -> Iterator[_Job]:
    """Siblings that share a recipe share a solve, because rows are independent given the Hessian; but not where a branch is
    anticipated, because its rank, and with it the Hessian, depends on the number of rows."""
    for group in statistics:
        waiting = [name for name in group if name in recipes]
        while waiting:
            recipe, rows = recipes[waiting[0]], weights[waiting[0]].shape[0]
            together = [
                name
                for name in waiting
                if recipes[name] == recipe and (not recipe.compensation.anticipates or weights[name].shape[0] == rows)
            ]
            waiting = [name for name in waiting if name not in together]
            yield _Job(group=group, names=tuple(together), recipe=recipe, scale_dtype=scale_dtypes[together[0]])


def _solve(
    weights: Mapping[str, Tensor], gathered: Mapping[Siblings, InputStatistics], job: _Job
) -> list[tuple[str, CompressedLinear, ModuleReport]]:
    started = time.perf_counter()
    statistics = gathered[job.group]
    sources = [weights[name].float() for name in job.names]
    recipe = job.recipe
    foreseen = anticipate(recipe.compensation, statistics, sources[0].shape[0])
    quantized = quantize(
        recipe.weights.quantizer, torch.cat(sources), foreseen, recipe.weights.format(), scale_dtype=job.scale_dtype
    )
    gram = statistics.gram.float()
    share = (time.perf_counter() - started) / len(job.names)
    solved: list[tuple[str, CompressedLinear, ModuleReport]] = []
    for name, weight, part in zip(job.names, sources, _split(quantized.weight, sources), strict=True):
        started = time.perf_counter()
        residual = weight - part.dequantize()
        fitted = compensate(recipe.compensation, residual, statistics, dtype=weights[name].dtype)
        branch = fitted.low_rank
        left = residual if branch is None else residual - branch.product()
        energy = _energy(weight, gram)
        error = None if energy == 0 else _energy(residual, gram) / energy
        fallbacks = [*quantized.fallbacks, *fitted.fallbacks]
        activations = recipe.activations
        linear = CompressedLinear(
            weight=part, low_rank=branch, activation_bits=None if activations is None else activations.bits
        )
        report = ModuleReport(
            name=name,
            rows=weight.shape[0],
            columns=weight.shape[1],
            bits=part.bits,
            group_size=part.group_size,
            rank=0 if branch is None else branch.rank,
            tokens=statistics.tokens,
            code_bits=part.codes.numel() * part.bits,
            scale_bits=_scale_bits(part),
            factor_bits=0 if branch is None else tensor_bits(branch.up) + tensor_bits(branch.down),
            error_quantized=error,
            error_compensated=None if energy == 0 else _energy(left, gram) / energy,
            fallbacks=tuple(FallbackReport(step=item.step, cause=item.cause) for item in fallbacks),
            seconds=share + time.perf_counter() - started,
        )
        solved.append((name, linear, report))
    return solved


def _split(weight: QuantizedWeight, like: Sequence[Tensor]) -> Iterator[QuantizedWeight]:
    start = 0
    for part in like:
        rows = slice(start, start + part.shape[0])
        start = rows.stop
        yield QuantizedWeight(
            codes=weight.codes[rows].clone(),
            scale=weight.scale[rows].clone(),
            zero_point=None if weight.zero_point is None else weight.zero_point[rows].clone(),
            bits=weight.bits,
            group_size=weight.group_size,
        )


def _energy(matrix: Tensor, gram: Tensor) -> float:
    """tr(M G M^T): the squared norm of M X, for a Gram matrix G = X X^T."""
    # Where next to nothing is left, rounding may leave less than nothing.
    return max(float(((matrix @ gram) * matrix).sum(dtype=torch.float64)), 0.0)


def tensor_bits(tensor: Tensor) -> int:
    """Storage of a tensor, in bits."""
    return tensor.numel() * tensor.element_size() * 8


def _scale_bits(weight: QuantizedWeight) -> int:
    zero_points = 0 if weight.zero_point is None else weight.zero_point.numel() * weight.bits
    return tensor_bits(weight.scale) + zero_points


def _accumulator(block: Block, group: Siblings) -> Accumulator:
    weight = block.linear(group[0]).weight
    return Accumulator(weight.shape[1], weight.device)


class _Tap:
    """Takes the moments of what enters the first linear of each group, while the context is open."""

    def __init__(self, block: Block, groups: Sequence[Siblings]) -> None:
        self.moments: dict[Siblings, ShardMoments] = {}
        self._block, self._groups = block, groups
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Tap:
        for group in self._groups:

            def take(_: nn.Module, arguments: tuple[Tensor, ...], group: Siblings = group) -> None:
                self.moments[group] = ShardMoments.of(arguments[0])

            self._handles.append(self._block.linear(group[0]).register_forward_pre_hook(take))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
