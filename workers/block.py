"""The heart of a block task, without files: gather statistics, quantize, compensate, measure.

1. `workers.shards` runs the block over its input shards and gathers each distinct input's moments on the way.
2. `compress` solves every linear: codes on a grid (linears with one input and one recipe in one solve, because they share a
   Hessian), then the low-rank branch on what the codes left, then the error that remains.
3. `install` puts the result into the block, so that it can be run as it will be served.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from counterweight.kernels.backend import Kernels, experts_on_kernels, on_kernels
from counterweight.kernels.decoding import tell_length
from counterweight.kernels.formats import LowRank
from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.kernels.linear import CompensatedLinear
from counterweight.kernels.residual import Correction
from counterweight.kernels.weights import StoredWeight
from counterweight.workers.batches import BATCH_BYTES, batch_size, batches
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.compensation.spectrum import spectrum
from counterweight.workers.held_out import Rows
from counterweight.workers.models.family import PROJECTIONS, SharedInputGroup
from counterweight.workers.parallel import OrderedPool
from counterweight.workers.recipe import ModuleRecipe, solved_together
from counterweight.workers.solve import LayerState, solve
from counterweight.workers.tasks.records import STARVED, FallbackReport, HeldOutErrors, ModuleReport

if TYPE_CHECKING:
    from counterweight.kernels.gpu.host_memory import HostArena
    from counterweight.workers.models.block_builder import (
        Block,  # transformers, which who only reads reports does not need
    )

Output = TypeVar("Output")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedLinear:
    """What became of one linear layer. activations: how its input is quantized at inference, None when weight-only.
    transform: of its input at inference."""

    weight: StoredWeight
    low_rank: LowRank | None
    activations: ActivationFormat | None
    transform: Hadamard | None = None
    residual: Correction | None = None

    def to(self, device: torch.device) -> CompressedLinear:
        """The same layer on another device."""
        branch = self.low_rank
        return CompressedLinear(
            weight=self.weight.to(device),
            low_rank=None if branch is None else branch.to(device),
            activations=self.activations,
            transform=self.transform,
            residual=None if self.residual is None else self.residual.to(device),
        )


def compress(
    weights: Mapping[str, Tensor],
    statistics: MutableMapping[SharedInputGroup, InputStatistics],
    recipes: Mapping[str, ModuleRecipe],
    *,
    scale_dtypes: Mapping[str, torch.dtype],
    factor_dtypes: Mapping[str, torch.dtype],
    outliers: Mapping[str, Tensor] | None = None,
    codes: Mapping[str, StoredWeight] | None = None,
    held_out: Mapping[SharedInputGroup, Rows] | None = None,
    batch_bytes: int = BATCH_BYTES[False],
    device: torch.device | str = "cpu",
    pool: OrderedPool,
) -> tuple[dict[str, CompressedLinear], list[ModuleReport]]:
    """Every linear that has a recipe, in table order.

    statistics: of each group among them; an entry is taken out when the group is solved. weights: linear -> weight [out, in],
    on any device. scale_dtypes, factor_dtypes: linear -> dtype in which its scales and the factors of its branch are stored.
    outliers: see `prepare`. codes: linear -> its codes, when they are chosen already. held_out: of tokens that reports judge
    the result by; a group without any is judged by its statistics. batch_bytes: that solves of one shape may take together,
    which changes no bit. device: of the statistics, and so of the arithmetic.
    """
    jobs = list(_solves(weights, statistics, recipes, scale_dtypes, factor_dtypes))
    order = [name for job in jobs for name in job.names]
    if forgotten := recipes.keys() - set(order):
        raise ValueError(f"no input statistics of {sorted(forgotten)}: expected those of every linear with a recipe")
    together = batches(
        jobs, lambda job: job.key, lambda job: batch_size(job.recipe, job.shapes, batch_bytes) if job.alone else 1
    )
    found: dict[str, tuple[CompressedLinear, ModuleReport]] = {}
    asked = _Asked(
        weights=weights,
        statistics=statistics,
        outliers=outliers or {},
        codes=codes or {},
        held_out=held_out or {},
        batch_bytes=batch_bytes,
        device=torch.device(device),
    )
    one = partial(_solve, asked)
    for batch, solved in zip(together, pool.map(one, together), strict=True):
        for job in batch:
            if job.last and not job.alone:
                del statistics[job.group]
        found.update(solved)
    return {name: found[name][0] for name in order}, [found[name][1] for name in order]


def install(
    block: Block,
    linears: Mapping[str, CompressedLinear],
    *,
    compensated: bool = True,
    decode_only: bool = False,
    kernels: Kernels = "auto",
    arena: HostArena | None = None,
) -> None:
    """Replaces the block's linears by their compressed selves, with or without what compensates them.

    decode_only: residual stores correct only tokens that come one at a time. kernels, arena: see `kernels.backend`; what is
    validated on a GPU and what is served there are the same kernels.
    """
    layers: dict[str, CompensatedLinear] = {}
    for name, linear in linears.items():
        bias = getattr(block.layer.get_submodule(name), "bias", None)
        layers[name] = CompensatedLinear(
            linear.weight,
            low_rank=linear.low_rank if compensated else None,
            bias=None if bias is None else bias.detach(),
            activations=linear.activations,
            transform=linear.transform,
            residual=linear.residual if compensated else None,
            decode_only=decode_only,
        )
    for place, experts in block.experts():
        own = [{name: f"{place}.{index}.{name}" for name in PROJECTIONS} for index in range(experts.experts)]
        if all(full in layers for names in own for full in names.values()):
            parts = [{name: layers[full] for name, full in names.items()} for names in own]
            together = experts_on_kernels(parts, experts.product, kernels)
            if together is not None:
                block.replace(place, together)
                layers = {name: layer for name, layer in layers.items() if not name.startswith(f"{place}.")}
    for name, layer in layers.items():
        block.replace(name, on_kernels(layer, kernels, arena))
    if decode_only and any(layer.residual is not None for layer in layers.values()):
        tell_length(block.layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Linears `names` that are solved as one. alone: no others of their group are; last: none behind them are."""

    group: SharedInputGroup
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    alone: bool
    last: bool
    recipe: ModuleRecipe
    scale_dtype: torch.dtype
    factor_dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        """What is equal in the jobs that are done in one call."""
        return self.recipe, self.shapes, self.alone, self.scale_dtype, self.factor_dtype


def _solves(
    weights: Mapping[str, Tensor],
    groups: Iterable[SharedInputGroup],
    recipes: Mapping[str, ModuleRecipe],
    scale_dtypes: Mapping[str, torch.dtype],
    factor_dtypes: Mapping[str, torch.dtype],
) -> Iterator[_Job]:
    """Linears that share an input and a recipe share a solve when they can."""
    for group in groups:
        own = {name: recipes[name] for name in group if name in recipes}
        solves = list(solved_together(own, {name: weights[name].shape[0] for name in own}))
        for names in solves:
            yield _Job(
                group=group,
                names=names,
                shapes=tuple((int(weights[name].shape[0]), int(weights[name].shape[1])) for name in names),
                alone=len(solves) == 1,
                last=names is solves[-1],
                recipe=recipes[names[0]],
                scale_dtype=scale_dtypes[names[0]],
                factor_dtype=factor_dtypes[names[0]],
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What all solves of one call of `compress` look at; see there."""

    weights: Mapping[str, Tensor]
    statistics: MutableMapping[SharedInputGroup, InputStatistics]
    outliers: Mapping[str, Tensor]
    codes: Mapping[str, StoredWeight]
    held_out: Mapping[SharedInputGroup, Rows]
    batch_bytes: int
    device: torch.device


def _solve(asked: _Asked, jobs: Sequence[_Job]) -> dict[str, tuple[CompressedLinear, ModuleReport]]:
    """Linears that are solved in one call, with what reports say of them."""
    started = time.perf_counter()
    layers: list[LayerState] = []
    for job in jobs:
        statistics = asked.statistics.pop(job.group) if job.alone else asked.statistics[job.group]
        layers += [
            LayerState(
                weight=asked.weights[name].to(asked.device).float(),
                statistics=statistics,
                scale_dtype=job.scale_dtype,
                factor_dtype=job.factor_dtype,
                outliers=asked.outliers.get(name),
                codes=asked.codes.get(name),
            )
            for name in job.names
        ]
    names = [name for job in jobs for name in job.names]
    rows = [asked.held_out.get(job.group) for job in jobs for _ in job.names]
    solved_layers = solve(jobs[0].recipe, layers, asked.batch_bytes)
    done = [(layer, _errors(layer, own), _judged(layer, own)) for layer, own in zip(solved_layers, rows, strict=True)]
    seconds = (time.perf_counter() - started) / len(names)
    solved = {}
    for name, (layer, (error_quantized, error_compensated), judged) in zip(names, done, strict=True):
        part, branch, residual, statistics = layer.stored, layer.branch, layer.residual, layer.statistics
        lack = statistics.starvation
        starved = () if lack is None else (FallbackReport(step=STARVED, cause=lack.cause),)
        linear = CompressedLinear(weight=part, low_rank=branch, activations=statistics.activations, residual=residual)
        report = ModuleReport(
            name=name,
            rows=part.shape[0],
            columns=part.shape[1],
            bits=part.form.bits,
            group_size=part.form.group_size,
            rank=0 if branch is None else branch.rank,
            tokens=statistics.tokens if lack is None else lack.tokens,
            drawn=statistics.drawn or 0,
            code_bits=part.code_bits,
            scale_bits=part.scale_bits,
            factor_bits=0 if branch is None else branch.bits,
            residual_bits=0 if residual is None else residual.bits_stored,
            error_quantized=error_quantized,
            error_compensated=error_compensated,
            held_out=judged,
            fallbacks=(*starved, *(FallbackReport(step=item.step, cause=item.cause) for item in layer.fallbacks)),
            seconds=seconds,
        )
        solved[name] = (linear, report)
    return solved


def _errors(layer: LayerState, rows: Rows | None) -> tuple[float | None, float | None]:
    """On the tokens that it was solved on; None each where there are `rows` of others, which say more, and where none were
    looked at."""
    return (None, None) if rows is not None or layer.statistics.gram is None else layer.errors()


def _judged(layer: LayerState, rows: Rows | None) -> HeldOutErrors | None:
    """On tokens that it was not solved on; None without any."""
    if rows is None:
        return None
    quantized, compensated = layer.errors_on(rows.x, rows.original)
    return HeldOutErrors(
        tokens=len(rows.x),
        of_layer=rows.of_layer,
        quantized=quantized,
        compensated=compensated,
        spectrum=() if layer.branch is None else spectrum(layer.branch, rows.x),
    )


def tensor_bits(tensor: Tensor) -> int:
    """Storage of a tensor, in bits."""
    return tensor.numel() * tensor.element_size() * 8
