"""How long a running job will still take, from the pace of what it has done."""

from __future__ import annotations

from dataclasses import dataclass, replace


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


def left(count: BlockCount, validation: Validation | None, now: float) -> float | None:
    """Seconds until the job is done, validation included; None where nothing is known yet."""
    if validation is not None:
        return validation.left(now, count.expected)
    blocks, expected = count.left(now), count.expected
    return None if blocks is None or expected is None else blocks + expected
