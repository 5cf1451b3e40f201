"""How much of a job follows its blocks: what the time that is left counts before any of it has begun."""

from __future__ import annotations

from counterweight.pipeline.plan import Plan
from counterweight.workers.models.layout import ModelLayout


def behind_blocks(plan: Plan, layout: ModelLayout, tokens: int) -> float:
    """The validation's arithmetic over that of all blocks. tokens: that it is measured on; 0 without one.

    Each model runs once over the tokens: the original, the quantized, and the compensated one where there is a branch or a
    store. The same rates are assumed for both, so it is a guess that holds until parts of the validation are done.
    """
    if not tokens or not plan.flops:
        return 0.0
    parts = [part for block in plan.blocks for part in block.recipe.values()]
    models = 3 if any(part.compensation.branch_rank or part.residual for part in parts) else 2
    passing = sum(block.forward_flops / max(1, len(block.passes)) for block in plan.blocks) / plan.tokens
    head = 2 * layout.hidden_size * layout.vocabulary
    return models * tokens * (passing + head) / plan.flops
