"""What a hostile input costs: processor time and memory, of this process and of children that have ended."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.patience import MAX_CPU

MAX_BYTES = 1 << 30
"""Of memory that a hostile input may cost beyond those before it, of which the first were harmless."""

_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


@dataclass(slots=True)
class Cost:
    """cpu: seconds. bytes: by which the largest size of a process has grown."""

    cpu: float = 0.0
    bytes: int = 0

    def check(self, normal: Cost) -> None:
        """TimeoutError, MemoryError when it is too much. normal: what a harmless input costs."""
        if self.cpu > normal.cpu + MAX_CPU:
            raise TimeoutError(f"{self.cpu:.1f} s of CPU: expected at most {normal.cpu:.1f} and {MAX_CPU:g}")
        if self.bytes > MAX_BYTES:
            raise MemoryError(f"{self.bytes >> 20} MiB: expected at most {MAX_BYTES >> 20}")

    def most(self, other: Cost) -> Cost:
        """The larger figures of both."""
        return Cost(max(self.cpu, other.cpu), max(self.bytes, other.bytes))


@contextmanager
def metered() -> Iterator[Cost]:
    """What happens inside; known behind it."""
    cost, before = Cost(), [resource.getrusage(who) for who in _WHO]
    try:
        yield cost
    finally:
        for old, new in zip(before, map(resource.getrusage, _WHO), strict=True):
            cost.cpu += new.ru_utime + new.ru_stime - old.ru_utime - old.ru_stime
            cost.bytes = max(cost.bytes, 1024 * (new.ru_maxrss - old.ru_maxrss))
