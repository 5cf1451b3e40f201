"""The short form of `make faults`: one seed of each kind whose workers are in this process. Those of processes are in
`tests/end_to_end/test_faults.py`, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from tests.disks import can_mount
from tests.faults.__main__ import made
from tests.faults.site import Drill

KINDS = [
    "worker dies before its work",
    "worker dies behind its commit",
    "disk full",
    "storage away",
    "refused with 503",
    "connection reset",
    "acknowledgement lost",
    "body cut off",
    "bit turned",
    "slow",
    "small disk",
]

ENDS = {"same bytes", "exit 4, then same bytes"}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Drill]]:
    with made(tmp_path_factory.mktemp("faults"), "moto", ["here"]) as groups:
        yield groups["here"].kinds


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_a_disturbed_job_ends_in_the_same_bytes(faults: dict[str, Drill], seed: int) -> None:
    if KINDS[seed] not in faults:
        pytest.skip("nobody but root may mount a disk")
    assert faults[KINDS[seed]](Random(seed)) in ENDS


def test_every_kind_is_in_the_short_form(faults: dict[str, Drill]) -> None:
    assert list(faults) == KINDS[: None if can_mount() else -1]
