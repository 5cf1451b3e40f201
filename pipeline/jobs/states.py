"""The states of a job and the causes of an attempt's end, as data."""

from __future__ import annotations

from enum import Enum
from typing import Self


class State(Enum):
    """terminal: nothing will change any more. active: the job holds a place among those that may run at once. ready: it waits
    for somebody who drives it."""

    QUEUED = ("queued", False, False, True)
    WAITING = ("waiting", False, False, False)
    """For its next try, because the surroundings failed."""
    RUNNING = ("running", False, True, False)
    LAPSED = ("lapsed", False, True, True)
    """Its driver is not heard of any more. The job keeps its place, and whoever comes takes it over."""
    CANCELLING = ("cancelling", False, True, False)
    SUCCEEDED = ("succeeded", True, False, False)
    FAILED = ("failed", True, False, False)
    CANCELLED = ("cancelled", True, False, False)
    DELETED = ("deleted", True, False, False)
    """Nobody wants to see it any more. Its record stays, so that its number is not given twice."""

    terminal: bool
    active: bool
    ready: bool

    def __new__(cls, word: str, terminal: bool, active: bool, ready: bool) -> Self:
        member = object.__new__(cls)
        member._value_ = word
        member.terminal, member.active, member.ready = terminal, active, ready
        return member


class Cause(Enum):
    """Why an attempt at a job ended. ends: the state of a job that is not tried again after it."""

    DONE = ("done", State.SUCCEEDED)
    REQUEST = ("request", State.FAILED)
    """The manifest, the model or a text is wrong."""
    GATE = ("gate", State.FAILED)
    SURROUNDINGS = ("surroundings", State.FAILED)
    """Storage, cluster or machine failed."""
    DEFECT = ("defect", State.FAILED)
    KILLED = ("killed", State.FAILED)
    """Somebody ended the process: the machine ran out of memory, for example."""
    LAPSED = ("lapsed", State.FAILED)
    """The driver was not heard of any more."""
    RELEASED = ("released", State.FAILED)
    """The driver was asked to end, and gave the job back."""
    CANCELLED = ("cancelled", State.CANCELLED)

    ends: State

    def __new__(cls, word: str, ends: State) -> Self:
        member = object.__new__(cls)
        member._value_ = word
        member.ends = ends
        return member


_EXIT_CODES = {
    0: Cause.DONE,
    2: Cause.REQUEST,
    3: Cause.GATE,
    4: Cause.SURROUNDINGS,
    130: Cause.KILLED,
    137: Cause.KILLED,
    143: Cause.KILLED,
}


def cause_of(exit_code: int) -> Cause:
    """What an exit code of `counterweight run` means; a negative one is a signal, as `subprocess` has it."""
    return Cause.KILLED if exit_code < 0 else _EXIT_CODES.get(exit_code, Cause.DEFECT)
