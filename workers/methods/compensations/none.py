"""No compensation."""

from __future__ import annotations

from typing import ClassVar, Literal

from counterweight.workers.methods.compensations.compensation import Compensation


class NoCompensation(Compensation):
    """Nothing is put back."""

    VERSION: ClassVar[int] = 1

    kind: Literal["none"] = "none"
