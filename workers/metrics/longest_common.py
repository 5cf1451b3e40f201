"""How many tokens a model writes after a prompt before the first that the original does not; greedily, mean over prompts."""

from __future__ import annotations

from counterweight.workers.metrics.metric import Measure

MEASURE = Measure(
    name="longest_common",
    label="longest common generation, tokens",
    short="common tokens",
    digits=".2f",
    higher_is_better=True,
    description="Of the samples of `generation`.",
)
