"""How many residual channels each linear layer can afford on a target GPU (the tuner of DecDEC, Park et al., OSDI 2025).

While a decoding step reads a layer's weights from its own memory, residual rows arrive over PCIe at the same time: up to
a knee they cost nothing. Given times per layer, measured or modelled, and a latency budget, `tune` chooses for each layer
how many channels of every 1024 are corrected (k_chunk), in two phases: first a common k_chunk and a common cap on thread
blocks, then layer by layer whatever still fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import ceil, inf, isfinite

from counterweight.kernels.forms import CHUNK
from counterweight.workers.methods.residual import Bandwidths, LatencyBudget, Residual
from counterweight.workers.recipe import ModuleRecipe

_COLUMNS_PER_STRIP = 256  # output channels that a thread block's smallest share holds


DEVICES: Mapping[str, Bandwidths] = {
    # As the paper gives them (Table 3); laptops have half the PCIe lanes.
    "RTX 4090": Bandwidths(dram=1008, pcie=32, multiprocessors=128),
    "RTX 4080 Super": Bandwidths(dram=736, pcie=32, multiprocessors=80),
    "RTX 4070 Super": Bandwidths(dram=504, pcie=32, multiprocessors=56),
    "RTX 4070 Mobile": Bandwidths(dram=256, pcie=16, multiprocessors=36),
    "RTX 4050 Mobile": Bandwidths(dram=192, pcie=16, multiprocessors=20),
    # Vendor's memory bandwidth, PCIe 5.0 x16; both are peaks.
    "H200": Bandwidths(dram=4800, pcie=64, multiprocessors=132),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A linear layer [rows, columns] = [out, in]."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Times of one layer at batch 1, in seconds.

    base: without residual. compensated: (thread blocks, k_chunk) -> with it; for each number of thread blocks, k_chunk
    runs from 1 without a gap.
    """

    shape: Shape
    base: float
    compensated: Mapping[tuple[int, int], float]

    def time(self, thread_blocks: int, k_chunk: int) -> float:
        """Infinite where nothing was measured, so that it fits no budget."""
        return self.base if k_chunk == 0 else self.compensated.get((thread_blocks, k_chunk), inf)

    def largest(self, cap: int) -> int:
        """The largest number of thread blocks up to `cap` that has times, 0 when there is none."""
        return max((blocks for blocks, _ in self.compensated if blocks <= cap), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a layer gets; k_chunk 0 and no thread block: no residual."""

    k_chunk: int
    thread_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualPlan:
    """The choice for each layer, and the share by which all of them together become slower."""

    choices: Mapping[str, Choice]
    slowdown: float


def knee(bits: float, device: Bandwidths) -> float:
    """The k_chunk up to which residuals arrive while the weights, `bits` each, are read: 1024 (pcie / dram) (bits / 4)."""
    return CHUNK * device.pcie / device.dram * bits / 4


def thread_block_candidates(shape: Shape, device: Bandwidths) -> tuple[int, ...]:
    """The numbers of thread blocks worth measuring, ascending, at most one per multiprocessor.

    Those up to the number of chunks among which channels are chosen, and those that share the output's strips of 256
    channels without a block to spare.
    """
    chunks, strips = ceil(shape.columns / CHUNK), ceil(shape.rows / _COLUMNS_PER_STRIP)
    even = {blocks for blocks in range(1, strips + 1) if ceil(strips / ceil(strips / blocks)) == blocks}
    return tuple(sorted(blocks for blocks in even | set(range(1, chunks + 1)) if blocks <= device.multiprocessors))


def points_to_measure(shape: Shape, bits: float, device: Bandwidths) -> list[tuple[int, int]]:
    """Every (thread blocks, k_chunk) that a `Profile` should hold: k_chunk up to twice the knee."""
    most = min(CHUNK, max(1, round(2 * knee(bits, device))))
    return [(blocks, k) for blocks in thread_block_candidates(shape, device) for k in range(1, most + 1)]


def modelled(shape: Shape, bits: float, device: Bandwidths) -> Profile:
    """Times from bandwidths alone: weights of `bits` each and residual rows of 4 bits are read at the same time.

    Lower bounds. The model knows no fixed cost (launch, selection, atomics) and takes any number of thread blocks to
    fill the link; on layers of a few microseconds, or where the base kernel is not bound by memory, measure.
    """
    # One division each, and last: at the knee both times are the same number.
    base = shape.rows * shape.columns * bits / 8 / (device.dram * 1e9)
    row_bytes = 4 * ceil(shape.rows / 8)

    def fetch(k_chunk: int) -> float:
        return Residual(channels_per_chunk=k_chunk).channels(shape.columns) * row_bytes / (device.pcie * 1e9)

    compensated = {(blocks, k): max(base, fetch(k)) for blocks, k in points_to_measure(shape, bits, device)}
    return Profile(shape=shape, base=base, compensated=compensated)


def tune(profiles: Mapping[str, Profile], budget: float) -> ResidualPlan:
    """Channels that keep the sum of all layers' times within (1 + budget) of its value without residuals, by the paper's two
    phases; no layer that has any could take one more.

    profiles: the linear layers that one token passes, or those of one block when all are alike. budget: 0.025 allows
    2.5 %. Layers that are dropped because not even one channel fits stay without a residual. ValueError for no layer,
    for times that are not positive and for a budget that is negative or not finite.
    """
    if not profiles:
        raise ValueError("profiles: none: expected at least one layer")
    if not 0 <= budget < inf:
        raise ValueError(f"budget: {budget}: expected a share of 0 or more, such as 0.025")
    for name, profile in profiles.items():
        if not all(isfinite(time) and time > 0 for time in (profile.base, *profile.compensated.values())):
            raise ValueError(f"{name}: holds a time that is not positive: expected seconds")
    baseline = sum(profile.base for profile in profiles.values())
    limit = (1 + budget) * baseline
    choices = _layer_by_layer(profiles, _common(profiles, limit), limit)
    return ResidualPlan(choices=choices, slowdown=_total(profiles, choices) / baseline - 1)


def afford(recipe: Mapping[str, ModuleRecipe], shapes: Mapping[str, tuple[int, int]]) -> dict[str, ModuleRecipe]:
    """A block's recipe with a number of channels in the place of every latency budget, by modelled times; without a store
    where not even one channel fits.

    shapes: linear -> [out, in]. Blocks are alike, so each is held to the budget by itself.
    """
    profiles: dict[LatencyBudget, dict[str, Profile]] = {}
    for name, part in recipe.items():
        if part.residual is not None and (budget := part.residual.budget) is not None:
            device = DEVICES[budget.device] if isinstance(budget.device, str) else budget.device
            shape = Shape(rows=shapes[name][0], columns=shapes[name][1])
            profiles.setdefault(budget, {})[name] = modelled(shape, part.weights.code_bits, device)
    channels = {
        name: choice.k_chunk
        for budget, own in profiles.items()
        for name, choice in tune(own, budget.slowdown).choices.items()
    }
    return {name: _with_channels(part, channels.get(name)) for name, part in recipe.items()}


def _with_channels(part: ModuleRecipe, channels: int | None) -> ModuleRecipe:
    """The recipe with that number of channels; as it is for None, without a store for 0."""
    if channels is None or part.residual is None:
        return part
    resolved = part.residual.model_copy(update={"channels_per_chunk": channels}) if channels else None
    return part.model_copy(update={"residual": resolved})


def _common(profiles: Mapping[str, Profile], limit: float) -> dict[str, Choice]:
    """Phase 1: the cap on thread blocks under which the largest common k_chunk fits, of equals the fastest.

    While nothing fits, the smallest layer is left out.
    """
    caps = sorted({blocks for profile in profiles.values() for blocks, _ in profile.compensated})
    kept = sorted(profiles, key=lambda name: profiles[name].shape.rows * profiles[name].shape.columns)
    while kept:
        found = [_under_cap(profiles, set(kept), cap, limit) for cap in caps]
        best = max(found, key=lambda item: (item[kept[0]].k_chunk, -_total(profiles, item)), default=None)
        if best is not None and best[kept[0]].k_chunk:
            return best
        kept = kept[1:]
    return {name: Choice(k_chunk=0, thread_blocks=0) for name in profiles}


def _under_cap(profiles: Mapping[str, Profile], kept: Set[str], cap: int, limit: float) -> dict[str, Choice]:
    """The largest common k_chunk that fits, reached step by step; 0 for the layers that are not `kept`."""
    choices = {name: Choice(k_chunk=0, thread_blocks=0) for name in profiles}
    blocks = {name: profiles[name].largest(cap) for name in kept}
    k_chunk = 0
    while True:  # ends, because beyond what was measured times are infinite
        k_chunk += 1
        more = choices | {name: Choice(k_chunk=k_chunk, thread_blocks=blocks[name]) for name in kept}
        if _total(profiles, more) > limit:
            return choices
        choices = more


def _layer_by_layer(profiles: Mapping[str, Profile], common: Mapping[str, Choice], limit: float) -> dict[str, Choice]:
    """Phase 2: rounds of one more k_chunk for every layer that still fits, the cheapest step first.

    A layer that phase 1 left out has no thread block, hence no finite time, and stays out.
    """
    choices = dict(common)

    def step(name: str) -> Choice:
        return Choice(k_chunk=choices[name].k_chunk + 1, thread_blocks=choices[name].thread_blocks)

    def cost(name: str) -> float:
        return _time(profiles[name], step(name)) - _time(profiles[name], choices[name])

    growing = True
    while growing:
        growing = False
        for name in sorted(choices, key=cost):
            more = choices | {name: step(name)}
            if _total(profiles, more) <= limit:
                choices, growing = more, True
    return choices


def _time(profile: Profile, choice: Choice) -> float:
    return profile.time(choice.thread_blocks, choice.k_chunk)


def _total(profiles: Mapping[str, Profile], choices: Mapping[str, Choice]) -> float:
    return sum(_time(profiles[name], choice) for name, choice in choices.items())
