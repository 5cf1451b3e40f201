"""What `plan` says of a block's memory is what its task takes, within `TOLERANCE`, whatever takes most of it.

Each case is large enough that what libraries and allocators keep for themselves does not matter, and has another step at its
peak: whoever takes that step's term out of the plan sees the case fail. `python -m tests.pipeline.peak` prints the numbers.
"""

from __future__ import annotations

import sys

import pytest

from tests.pipeline.peak import measured_apart
from tests.pipeline.peak_cases import CASES, SHARED

TOLERANCE = 0.15
BY_CHANCE = 0.35
"""Likewise with several threads, whose peaks may or may not meet: the plan says what it takes when they do."""
PARTS = 4
"""For so many testers at once; each imports torch again."""
LEAST = 150 << 20
"""Bytes of growth from which it is worth to compare."""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("part", range(PARTS))
def test_a_blocks_peak_is_what_is_planned(part: int) -> None:
    names = list(CASES)[part::PARTS]
    wrong = {}
    for name, found in zip(names, measured_apart([CASES[name][0] for name in names]), strict=True):
        over = BY_CHANCE if CASES[name][0].threads > 1 else TOLERANCE
        near = 1 - TOLERANCE < found.planned / found.measured < 1 + over
        if not near or found.measured < LEAST or found.phase != CASES[name][1]:
            wrong[name] = found
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_what_a_worker_does_of_a_shared_block_takes_no_more_than_the_block_alone() -> None:
    """Of few large linears as much: whoever has the largest takes what the block does. Of many experts a share."""
    found = dict(zip(SHARED, measured_apart([job for job, _ in SHARED.values()]), strict=True))
    wrong = {name: peak for name, peak in found.items() if peak.planned / peak.measured < 1 - TOLERANCE}
    assert not wrong
    assert min(peak.measured for peak in found.values()) > LEAST
