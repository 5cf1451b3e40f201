"""Compensations, one file each. A further one is a file here and its class in `AnyCompensation`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from counterweight.workers.methods.compensations.aser import ASER
from counterweight.workers.methods.compensations.compensation import Compensation
from counterweight.workers.methods.compensations.lrc import LRC
from counterweight.workers.methods.compensations.none import NoCompensation
from counterweight.workers.methods.compensations.svd import SVD

__all__ = ["ASER", "LRC", "SVD", "AnyCompensation", "Compensation", "NoCompensation"]

AnyCompensation = Annotated[NoCompensation | SVD | ASER | LRC, Field(discriminator="kind")]
