"""One budget of bits for the branches of a whole model, shared out by what each direction would win.

A layer's squared singular values say what each further rank takes off its relative error; a rank of a layer [out, in] costs
(out + in) factors. Gains fall within a layer, so taking directions in the order of gain per bit until the budget is spent wins
as much as any choice could, but for less than the gain of one direction: the first that no longer fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.blocks import BlockRecipe
from counterweight.pipeline.model_source import ModelSource
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.gains import GainsRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layer [rows, columns] that shares the budget. gains: of each further rank, descending. factor_bits: of a factor."""

    rows: int
    columns: int
    gains: Sequence[float]
    factor_bits: int

    @property
    def cost(self) -> int:
        """Bits of one more rank; integer factors have two steps of 32 bits."""
        steps = 64 if self.factor_bits <= 8 else 0
        return (self.rows + self.columns) * self.factor_bits + steps


Layer = tuple[int, str]
"""Block and linear."""


def allocate(candidates: Mapping[Layer, Candidate], budget_bits: float) -> dict[Layer, int]:
    """The rank of each candidate; 0 for one that gets nothing. `budget_bits` are bits per weight of all candidates."""
    left = budget_bits * sum(candidate.rows * candidate.columns for candidate in candidates.values())
    offers = sorted(
        (-gain / candidate.cost, layer)
        for layer, candidate in candidates.items()
        for gain in candidate.gains
        if gain > 0
    )
    ranks = dict.fromkeys(candidates, 0)
    full: set[Layer] = set()
    for _, layer in offers:
        cost = candidates[layer].cost
        if layer in full or cost > left:
            full.add(layer)  # its next direction wins less than this one would have
            continue
        ranks[layer] += 1
        left -= cost
    return ranks


def share_out(
    source: ModelSource, recipes: Sequence[BlockRecipe], gains: Mapping[int, GainsRecord]
) -> list[BlockRecipe]:
    """Each block's recipes with a rank in the place of every budget. gains: of each block with a layer that has one."""
    candidates: dict[float, dict[Layer, Candidate]] = {}
    for index, found in gains.items():
        shapes = source.layout.block_parameters(index)
        places = source.layout.sources(index, source.checkpoint.names)
        for name, part in recipes[index].items():
            if (budget := part.budget_bits) is None:
                continue
            rows, columns = shapes[f"{name}.weight"]
            dtype = source.checkpoint.entry(places[f"{name}.weight"].source).dtype
            candidates.setdefault(budget, {})[index, name] = Candidate(
                rows=rows, columns=columns, gains=found.gains[name], factor_bits=_factor_bits(part, dtype.itemsize)
            )
    ranks = {layer: rank for budget, sharing in candidates.items() for layer, rank in allocate(sharing, budget).items()}
    return [
        {name: with_rank(part, ranks[index, name]) if (index, name) in ranks else part for name, part in recipe.items()}
        for index, recipe in enumerate(recipes)
    ]


def budgeted(recipes: Sequence[BlockRecipe]) -> frozenset[int]:
    """Blocks with a layer whose rank is drawn from a budget."""
    return frozenset(
        index for index, recipe in enumerate(recipes) if any(part.budget_bits is not None for part in recipe.values())
    )


def _factor_bits(part: ModuleRecipe, itemsize: int) -> int:
    own = part.compensation.branch_bits
    return 8 * itemsize if own is None else own


def with_rank(part: ModuleRecipe, rank: int) -> ModuleRecipe:
    """The recipe with its share of the budget; without a branch when it got none."""
    return part.model_copy(update={"compensation": part.compensation.with_rank(rank)})
