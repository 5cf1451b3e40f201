"""How long a running job will still take: as its plan says, and from the pace of what it has done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from counterweight.pipeline.events import BlockDone, Event, Expected, Planned, StageEntered, WindowsDone

Clock = Callable[[], float]
"""Seconds since some fixed moment, never going back."""

START, BLOCKS, VALIDATE = "start", "blocks", "validate"
"""Stages: before there are workers; and those whose end can be told by their parts."""


@dataclass(frozen=True, slots=True)
class BlockCount:
    """How many blocks are done, and how long the rest will take at the pace so far.

    The pace is the wall time since `since` per block that this job finished itself, so it holds for any number of
    workers; blocks that were reused took none of it. own: blocks that this job finished. latest: when the last of
    them was. behind: what follows the blocks, as a multiple of all blocks' time.
    """

    blocks: int = 0
    done: int = 0
    own: int = 0
    since: float = 0.0
    latest: float = 0.0
    behind: float = 0.0

    def finished(self, now: float, *, reused: bool) -> BlockCount:
        """With one more block done."""
        if reused:
            return replace(self, done=self.done + 1)
        return replace(self, done=self.done + 1, own=self.own + 1, latest=now)

    def left(self, now: float) -> float | None:
        """Seconds until the last block is done; None before the first block that was not reused."""
        remaining = self.blocks - self.done
        if remaining <= 0:
            return 0.0
        if self.own == 0:
            return None
        return max(self.pace * remaining - (now - self.latest), 0.0)

    @property
    def pace(self) -> float:
        """Seconds of a block of its own."""
        return (self.latest - self.since) / self.own if self.own else 0.0

    @property
    def expected(self) -> float | None:
        """Seconds of what follows the blocks; None before the first block that was not reused, unless nothing follows."""
        if self.behind == 0:
            return 0.0
        return self.pace * self.blocks * self.behind if self.own else None


@dataclass(frozen=True, slots=True)
class Validation:
    """How far the validation is. since: when it began; done: of `total` parts; latest: when the last of them was done."""

    since: float
    done: int = 0
    total: int = 0
    latest: float = 0.0

    def left(self, now: float, expected: float | None) -> float | None:
        """Seconds until it is over: at its own pace, or, before there is one, of the `expected` seconds."""
        if self.done:
            pace = (self.latest - self.since) / self.done
            return max(pace * (self.total - self.done) - (now - self.latest), 0.0)
        return None if expected is None else max(expected - (now - self.since), 0.0)


class Remaining:
    """How long the job still takes, from its events: as its plan says at first, then by the pace of what is measured.

    Read by a thread that draws while another tells of events: what it holds is replaced, not changed.
    """

    def __init__(self, clock: Clock) -> None:
        self.count = BlockCount()
        self.validation: Validation | None = None
        self._clock = clock
        self._stage, self._since = START, clock()
        self._expected: Mapping[str, float] = {}

    def on(self, event: Event) -> None:
        """Takes in an event."""
        now = self._clock()
        match event:
            case Expected(stages):
                self._expected = stages
            case StageEntered(stage):
                self._stage, self._since = stage, now
                self.validation = Validation(now) if stage == VALIDATE else None
            case Planned(blocks, behind=behind):
                self.count = BlockCount(blocks, since=now, latest=now, behind=behind)
            case BlockDone(reused=reused):
                self.count = self.count.finished(now, reused=reused)
            case WindowsDone(done, total):
                since = now if self.validation is None else self.validation.since
                self.validation = Validation(since, done, total, now)

    @property
    def planned(self) -> bool:
        """Whether the plan's seconds are known."""
        return bool(self._expected)

    def left(self) -> float | None:
        """Seconds until the job is done, validation included; None where nothing is known yet."""
        now = self._clock()
        if not self._expected:
            return self._by_pace(now)
        later = self._scale * self._later()
        if self.validation is not None and self.validation.done:
            return (self.validation.left(now, None) or 0.0) + later
        if self._stage == BLOCKS and self.count.own:
            return (self.count.left(now) or 0.0) + later
        expected = self._scale * self._expected.get(self._stage, 0.0)
        if self._stage == BLOCKS and self.count.blocks:
            expected *= 1.0 - self.count.done / self.count.blocks
        return max(expected - (now - self._since), 0.0) + later

    def _by_pace(self, now: float) -> float | None:
        if self._stage not in (BLOCKS, VALIDATE) or not self.count.blocks:
            return None
        if self.validation is not None:
            return self.validation.left(now, self.count.expected)
        blocks, expected = self.count.left(now), self.count.expected
        return None if blocks is None or expected is None else blocks + expected

    @property
    def _scale(self) -> float:
        """By how much blocks take longer than the plan says, which is taken to hold for what follows them."""
        expected = self._expected.get(BLOCKS, 0.0)
        return self.count.pace * self.count.blocks / expected if self.count.own and expected else 1.0

    def _later(self) -> float:
        """Seconds of the stages behind this one, as the plan says; none behind one that it does not know."""
        stages = list(self._expected)
        behind = stages[stages.index(self._stage) + 1 :] if self._stage in stages else []
        return sum(self._expected[stage] for stage in behind)
