"""The low-rank branch beside the codes: what its options are, whatever it is fitted to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from counterweight.workers.methods.compensations.compensation import Compensation
from counterweight.workers.methods.compensations.none import NoCompensation
from counterweight.workers.methods.compensations.rank import AnyRank, CountRank, FractionRank, Rank


class Branch(Compensation):
    """What compensations with a low-rank branch have in common."""

    rank: AnyRank = Field(default_factory=lambda: FractionRank(fraction=0.1))
    """Rank of the branch."""
    factor_bits: Literal[4, 8] | None = None
    """Bits of the branch's factors; null: the source's 16 or 32, as PEFT wants them. 4 buy twice the rank of 8. LRC's branch
    carries much of the weight itself, so that 4 bits lose much unless the codes are fitted last: `refit: none`."""

    def problem(self, rows: int, columns: int) -> str | None:
        return self.rank.problem(rows, columns)

    @property
    def branch_rank(self) -> Rank | None:
        return self.rank

    @property
    def branch_bits(self) -> Literal[4, 8] | None:
        return self.factor_bits

    def with_rank(self, count: int) -> Compensation:
        if count == 0:
            return NoCompensation()
        return self.model_copy(update={"rank": CountRank(count=count)})
