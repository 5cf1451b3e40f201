"""Is an attempt at a job repeated, and when?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from counterweight.pipeline.jobs.states import Cause

BUDGETS = MappingProxyType({Cause.SURROUNDINGS: 3, Cause.KILLED: 2, Cause.LAPSED: 5})
"""Repetitions of one job for each cause. Surroundings mend, and a run has waited for its storage for ten minutes by then. A
process that was killed probably needs more memory than there is. Drivers die with their machines; one that is asked to end
gives its job back, which is no failure."""


@dataclass(frozen=True, slots=True)
class JobRetries:
    """A budget per cause: a job whose storage was away twice has not used up what it has for drivers that die. Causes without a
    budget are final: a wrong request stays wrong. first, most: seconds before the first repetition, doubled each time."""

    budgets: Mapping[Cause, int] = field(default_factory=lambda: BUDGETS)
    first: float = 10.0
    most: float = 600.0

    def delay(self, cause: Cause, failures: Mapping[Cause, int]) -> float | None:
        """Seconds until the next try, or None when there is none. failures: those before this one."""
        before = failures.get(cause, 0)
        if before >= self.budgets.get(cause, 0):
            return None
        return float(min(self.first * 2**before, self.most))
