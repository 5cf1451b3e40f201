"""One budget of bits for the branches of a whole model, shared out by what each direction would win.

A layer's squared singular values say what each further rank takes off its relative error; a rank of a layer [out, in] costs
(out + in) factors. Gains fall within a layer, so taking directions in the order of gain per bit until the budget is spent is
the best use of it (but for the last few bits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.model_source import ModelSource
from counterweight.workers.recipe import BudgetRank, ModuleRecipe
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.gains import Gains
from counterweight.workers.workspace import Blob


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
        steps = 64 if self.factor_bits == 8 else 0
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
    dispatcher: Dispatcher,
    source: ModelSource,
    recipes: Sequence[Mapping[str, ModuleRecipe]],
    spec_of: Callable[[int, tuple[Blob, ...]], BlockSpec],
    first: tuple[Blob, ...],
) -> list[Mapping[str, ModuleRecipe]]:
    """Each block's recipes with a rank in the place of every budget; as they are when none has one.

    One pass over the original blocks, one after the other, asks what branches could win. first: what enters block 0.
    """
    if all(budget_of(part) is None for recipe in recipes for part in recipe.values()):
        return list(recipes)
    candidates: dict[float, dict[Layer, Candidate]] = {}
    inputs = first
    for index, recipe in enumerate(recipes):
        spec = spec_of(index, inputs).model_copy(update={"propagate": "original", "paired": False})
        (found,) = dispatcher.run_all([Gains(block=spec)])
        inputs = found.outputs
        shapes = source.layout.block_parameters(index)
        places = source.layout.sources(index, source.checkpoint.names)
        for name, part in recipe.items():
            if (budget := budget_of(part)) is None:
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


def _factor_bits(part: ModuleRecipe, itemsize: int) -> int:
    own = part.compensation.branch_bits
    return 8 * itemsize if own is None else own


def budget_of(part: ModuleRecipe) -> float | None:
    """The budget that a layer's rank is drawn from, None when it has a rank of its own."""
    rank = part.compensation.branch_rank
    return rank.budget_bits if isinstance(rank, BudgetRank) else None


def with_rank(part: ModuleRecipe, rank: int) -> ModuleRecipe:
    """The recipe with its share of the budget; without a branch when it got none."""
    return part.model_copy(update={"compensation": part.compensation.with_rank(rank)})
