"""What a metric is: a number of every window of text, how the numbers of all windows become one, and what is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Positions of one window under two models, the original and the one that is judged.

    divergence: KL(original || this) of the next token, in nats, [positions] float32. likelihood: this model's log-probability
    of the token that follows, where there is one, [positions, the window's last without] float32. agreed: whether both find the
    same next token most probable, [positions] bool. routed: share of the window's tokens that go to the same experts under
    both, of each sparse block.
    """

    divergence: Tensor
    likelihood: Tensor
    agreed: Tensor
    routed: Sequence[float] = ()

    @classmethod
    def of(cls, reference: Tensor, own: Tensor, following: Tensor) -> Comparison:
        """reference, own: log-probabilities of the next token under the original and under this model, [positions, vocabulary]
        float32; the same tensor where this is the original. following: the tokens that follow, one less at a window's end."""
        import torch
        from torch.nn import functional

        likelihood = own[: len(following)].gather(1, following.long().to(own.device)[:, None])[:, 0]
        if own is reference:
            zeros = own[:, 0] - own[:, 0]  # but where logits are not finite: a whole row is NaN then
            return cls(divergence=zeros, likelihood=likelihood, agreed=torch.ones_like(zeros, dtype=torch.bool))
        return cls(
            divergence=functional.kl_div(own, reference, reduction="none", log_target=True).sum(-1),
            likelihood=likelihood,
            agreed=own.argmax(-1) == reference.argmax(-1),
        )

    @classmethod
    def joined(cls, parts: Sequence[Comparison], routed: Sequence[float] = ()) -> Comparison:
        """A window, of its parts in order."""
        import torch

        return cls(
            divergence=torch.cat([part.divergence for part in parts]),
            likelihood=torch.cat([part.likelihood for part in parts]),
            agreed=torch.cat([part.agreed for part in parts]),
            routed=routed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number that models are judged by, however it is found. name: in records, reports and gates. label: with its unit, for a
    table. short: for a line. digits: a format. higher_is_better: whether it is. relative: whether a gate bounds its multiple of
    the original's, as `<name>_ratio`, and not itself. sparse: whether only models with experts have it. description: of the
    gate.
    """

    name: str
    label: str
    short: str
    digits: str
    higher_is_better: bool = False
    relative: bool = False
    sparse: bool = False
    description: str

    @property
    def gate(self) -> str:
        """What the gate on it is called in a manifest."""
        return f"{self.name}_ratio" if self.relative else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(Measure):
    """A measure of text. of_window: its number for one window, None for a model that has none. over_windows: their summary."""

    of_window: Callable[[Comparison], float | None]
    over_windows: Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is measured along a window, a number for each of some ranges of positions. ranges: of windows of a length, side by
    side. of_window: the numbers of one window. Their summary over windows is the mean, range by range."""

    name: str
    label: str
    ranges: Callable[[int], tuple[range, ...]]
    of_window: Callable[[Comparison], tuple[float, ...]]


def mean(values: Sequence[float]) -> float:
    """Over windows, in the order given."""
    return sum(values) / len(values)
