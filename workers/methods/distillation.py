"""A compressed model that is trained as a whole, behind the closed forms. `workers/distillation` has the mathematics."""

from __future__ import annotations

from math import ceil
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from counterweight.workers.config import Method

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Share = Annotated[int, Field(strict=True, ge=1, le=1000)]


class Distillation(Method):
    """Training of a compressed model on the divergence of its predictions from the original's; codes stay as they are.

    The objective is KL(original || compressed) in the mean over tokens (Hinton et al. 2015, at temperature 1), the optimizer
    Adam with a warm-up and a cosine to zero, and what is kept is an exponential average over the steps (Polyak averaging). An
    epoch counts only if no held-out text diverges more than it did before training; of those the best is kept, and without
    one the model stays as it was.

    Replicas train on parts of an epoch at the same time, each on a worker of its own where there are as many, and are averaged
    after each round (local SGD: Stich 2018, arXiv 1805.09767; Lin et al. 2018, arXiv 1808.07217). Their number is a part of the
    recipe: the result does not depend on the number of workers.
    """

    VERSION: ClassVar[int] = 1

    epochs: Count = 1
    """Passes over the training sequences at most."""
    batch: Count = 4
    """Sequences per step."""
    factors: bool = True
    """Whether the branches' factors are trained."""
    scales: bool = True
    """Whether a gain of each output channel is trained, which multiplies the scales of its codes."""
    norms: bool = True
    """Whether the weights of the norms inside the blocks are trained."""
    factor_rate: Rate = 3e-4
    """Learning rate of the factors at its peak."""
    scale_rate: Rate = 2e-3
    """That of gains and norms."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which rates rise to their peak."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the average for each step; 0: what the last step left is taken."""
    ridge: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared distance of each trained tensor from where it began, relative to its own square; 0: none."""
    patience: Count = 2
    """Epochs without a better divergence of the held-out texts after which training stops."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 32)] = 0
    """Decides the order of the sequences."""
    replicas: Share = 1
    """Copies of the model that train side by side; each takes its share of an epoch's sequences, in steps of its own."""
    rounds: Share = 1
    """How often an epoch the replicas are averaged: weights, their running averages and Adam's moments."""

    @model_validator(mode="after")
    def _trains_something(self) -> Distillation:
        if not (self.factors or self.scales or self.norms):
            raise ValueError("factors, scales, norms: all false: expected one to train")
        return self

    @model_validator(mode="after")
    def _averages_several(self) -> Distillation:
        if self.replicas == 1 and self.rounds > 1:
            raise ValueError(f"rounds: {self.rounds}: expected 1 unless there are replicas to be averaged")
        return self

    @property
    def parts(self) -> int:
        """Into how many parts an epoch's sequences are divided."""
        return self.replicas * self.rounds

    def steps(self, sequences: int) -> int:
        """Steps of a replica in a round of an epoch of so many sequences; where parts differ by a sequence, of the largest."""
        return ceil(ceil(sequences / self.parts) / self.batch)

    def finished(self, epoch: int, best: int) -> bool:
        """Whether training ends behind `epoch` passes, of which `best` is the one that is kept so far."""
        return epoch >= self.epochs or epoch - best >= self.patience

    def determines(self) -> dict[str, object]:
        """Its part of a key. With one replica that of the revisions that knew no others: what they finished is found."""
        return self.model_dump(mode="json", exclude={"replicas", "rounds"} if self.replicas == 1 else None)
