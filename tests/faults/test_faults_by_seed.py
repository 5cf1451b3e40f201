"""The short form of `make faults`: one seed of each kind whose workers are in this process, and of some of a worker that is a
fork. Those under Ray are in `tests/end_to_end/test_faults.py`, one at a time."""

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

FORKED = {
    "driver killed": 32,
    "worker killed": 2,
    "worker out of memory, killed": 104,
    "worker out of memory, refused": 137,
}
"""Kinds that need not wait for a process that is frozen -> seeds of an early moment, so that something does happen."""

ENDS = {"same bytes", "exit 4, then same bytes", "exit -9, then same bytes"}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Drill]]]:
    with made(tmp_path_factory.mktemp("faults"), "moto", ["here", "forked"]) as groups:
        yield {name: group.kinds for name, group in groups.items()}


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_a_disturbed_job_ends_in_the_same_bytes(faults: dict[str, dict[str, Drill]], seed: int) -> None:
    if KINDS[seed] not in faults["here"]:
        pytest.skip("nobody but root may mount a disk")
    assert faults["here"][KINDS[seed]](Random(seed)) in ENDS


@pytest.mark.parametrize("kind", FORKED)
def test_so_does_one_whose_worker_is_a_fork(faults: dict[str, dict[str, Drill]], kind: str) -> None:
    assert faults["forked"][f"{kind}, without Ray"](Random(FORKED[kind])) in ENDS


def test_every_kind_is_in_the_short_form(faults: dict[str, dict[str, Drill]]) -> None:
    assert list(faults["here"]) == KINDS[: None if can_mount() else -1]
