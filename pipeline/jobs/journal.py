"""What a job's journal may hold. Texts are for people; what decides are the kinds, their order and the store's dates."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from counterweight.pipeline.jobs.states import Cause
from counterweight.workers.config import Config

MAX_LINE = 2000
"""Characters of a line that is kept of what a run said."""


def _nonce() -> str:
    return uuid.uuid4().hex


class Leased(Config):
    """Somebody drives the job from now on. seconds: without a beat for so long, it counts as dead."""

    kind: Literal["leased"] = "leased"
    nonce: str = Field(default_factory=_nonce)
    holder: str
    seconds: Annotated[float, Field(gt=0)]


class Cancel(Config):
    """The job is to be stopped."""

    kind: Literal["cancel"] = "cancel"
    nonce: str = Field(default_factory=_nonce)
    line: Annotated[str, Field(max_length=MAX_LINE)] = ""


class Ended(Config):
    """The attempt under the last lease ended, or the job without one. again: whether it is tried again, after `delay` seconds;
    otherwise the job is at its end. exit_code, line: of `counterweight run`. artifact: its URI."""

    kind: Literal["ended"] = "ended"
    nonce: str = Field(default_factory=_nonce)
    cause: Cause
    again: bool = False
    delay: Annotated[float, Field(ge=0)] = 0.0
    exit_code: int | None = None
    line: Annotated[str, Field(max_length=MAX_LINE)] = ""
    artifact: str | None = None


class Deleted(Config):
    """The job, which was at its end, is out of sight from now on."""

    kind: Literal["deleted"] = "deleted"
    nonce: str = Field(default_factory=_nonce)
    line: Annotated[str, Field(max_length=MAX_LINE)] = ""


Entry = Leased | Cancel | Ended | Deleted

ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])
"""Reads and writes entries as JSON."""
