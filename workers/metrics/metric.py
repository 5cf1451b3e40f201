"""What a metric is: a number of every window of text, how the numbers of all windows become one, and what is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expected:
    """What the original expects behind some positions of one window, which every model is compared with.

    log_probabilities, probabilities: of the next token, [positions, vocabulary] float32. top: the most probable one,
    [positions, 1] int64.
    """

    log_probabilities: Tensor
    probabilities: Tensor
    top: Tensor

    @classmethod
    def of(cls, log_probabilities: Tensor) -> Expected:
        """log_probabilities: of the next token, [positions, vocabulary] float32."""
        return cls(
            log_probabilities=log_probabilities,
            probabilities=log_probabilities.exp(),
            top=log_probabilities.argmax(-1, keepdim=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Positions of one window under two models, the original and the one that is judged.

    divergence: KL(original || this) of the next token, in nats, [positions] float32. likelihood: this model's log-probability
    of the token that follows, where there is one, [positions, the window's last without] float32. agreed: whether the
    original's most probable next token is this model's too, [positions] bool. routed: share of the window's tokens that go to
    the same experts under both, of each sparse block.
    """

    divergence: Tensor
    likelihood: Tensor
    agreed: Tensor
    routed: Sequence[float] = ()

    @classmethod
    def of_original(cls, expected: Expected, following: Tensor) -> Comparison:
        """The original with itself. following: the tokens that follow, one less at a window's end."""
        import torch

        own = expected.log_probabilities
        zeros = own[:, 0] - own[:, 0]  # but where logits are not finite: a whole row is NaN then
        agreed = torch.ones_like(zeros, dtype=torch.bool)
        return cls(divergence=zeros, likelihood=_likelihood(own, following), agreed=agreed)

    @classmethod
    def of(cls, expected: Expected, own: Tensor, following: Tensor) -> Comparison:
        """own: log-probabilities of the next token under this model, [positions, vocabulary] float32, which are overwritten:
        they are the largest tensors of a validation, and memory that is new to a process costs more than what is computed in
        it. following: as above."""
        import torch

        likelihood = _likelihood(own, following)
        agreed = own.gather(1, expected.top)[:, 0] == own.amax(-1)
        excess = torch.sub(expected.log_probabilities, own, out=own).mul_(expected.probabilities)
        return cls(divergence=excess.sum(-1), likelihood=likelihood, agreed=agreed)

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


def _likelihood(own: Tensor, following: Tensor) -> Tensor:
    """Log-probabilities of the tokens that follow, [those]. own: [positions, vocabulary]."""
    return own[: len(following)].gather(1, following.long().to(own.device)[:, None])[:, 0]


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
