"""What a worker keeps in memory of the blocks that it has calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from counterweight.workers.calibrated_block import CalibratedBlock
from counterweight.workers.held_blocks import HeldBlocks


@dataclass(frozen=True)
class Sized:
    key: str
    bytes: int


def block(key: str, size: int = 1) -> CalibratedBlock:
    return cast(CalibratedBlock, Sized(key, size))


def keys(held: HeldBlocks, names: str) -> str:
    """Those of the names that are held, which are then held no longer."""
    return "".join(name for name in names if held.take(name) is not None)


def test_what_is_taken_is_held_no_longer() -> None:
    held = HeldBlocks(10)
    held.hold(block("a"))
    assert keys(held, "a") == "a"
    assert keys(held, "a") == ""


def test_a_block_that_is_not_kept_goes_when_the_next_is_calibrated() -> None:
    held = HeldBlocks(10)
    held.hold(block("a"))
    held.hold(block("b"), keep=True)
    assert held.make_room()
    assert not held.make_room()
    assert keys(held, "ab") == "b"


@pytest.mark.parametrize(("limit", "left"), [(0, ""), (1, "d"), (2, "cd"), (3, "bcd"), (9, "abcd")])
def test_the_oldest_go_first(limit: int, left: str) -> None:
    held = HeldBlocks(limit)
    for name in "abcd":
        held.hold(block(name), keep=True)
    held.make_room()
    assert keys(held, "abcd") == left


def test_a_block_that_is_held_again_is_kept_only_where_it_is_asked_for() -> None:
    held = HeldBlocks(10)
    held.hold(block("a"), keep=True)
    taken = held.take("a")
    assert taken is not None
    held.hold(taken)
    held.make_room()
    assert keys(held, "a") == ""


def test_clearing_leaves_nothing() -> None:
    held = HeldBlocks(10)
    held.hold(block("a"), keep=True)
    held.clear()
    assert keys(held, "a") == ""
