"""What a metric is: a number of every window of text, how the numbers of all windows become one, and what is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Comparison:
    """One window under two models. reference, own: log-probabilities of the next token under the original and under the model
    that is judged, [length, vocabulary] float32. ids: the window's tokens, [length]. routed: share of them that go to the same
    experts under both, of each sparse block."""

    def __init__(self, reference: Tensor, own: Tensor, ids: Tensor, routed: Sequence[float] = ()) -> None:
        self.reference, self.own, self.ids, self.routed = reference, own, ids, routed

    @cached_property
    def divergence(self) -> Tensor:
        """KL(original || this) at each position, in nats, [length] float32."""
        from torch.nn import functional

        return functional.kl_div(self.own, self.reference, reduction="none", log_target=True).sum(-1)


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
