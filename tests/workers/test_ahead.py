"""What is read while a worker computes: the right thing, one at a time, and its errors to who asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from counterweight.workers.ahead import ReadAhead
from tests.patience import PATIENCE


@pytest.fixture(params=[True, False], ids=["on", "off"])
def ahead(request: pytest.FixtureRequest) -> Iterator[ReadAhead]:
    opened = ReadAhead(on=request.param)
    yield opened
    opened.close()


def never() -> str:
    raise AssertionError("read twice")


def test_what_was_begun_is_taken_and_read_once() -> None:
    ahead = ReadAhead(on=True)
    ahead.begin("a", lambda: "found")
    ahead.begin("a", never)
    assert ahead.take("a", never) == "found"
    assert ahead.take("a", lambda: "again") == "again"
    ahead.close()


def test_it_is_read_while_this_thread_goes_on() -> None:
    ahead, meet = ReadAhead(on=True), threading.Barrier(2, timeout=PATIENCE)
    ahead.begin("a", meet.wait)
    meet.wait()
    ahead.take("a", never)
    ahead.close()


def test_where_nothing_is_read_ahead_it_is_read_when_it_is_taken() -> None:
    ahead = ReadAhead(on=False)
    ahead.begin("a", never)
    assert ahead.take("a", lambda: "now") == "now"
    ahead.close()


def test_another_thing_is_read_at_once_and_the_first_one_still_waits() -> None:
    ahead = ReadAhead(on=True)
    ahead.begin("a", lambda: "a")
    assert ahead.take("b", lambda: "b") == "b"
    assert ahead.take("a", never) == "a"
    ahead.close()


def test_one_thing_is_held() -> None:
    ahead = ReadAhead(on=True)
    ahead.begin("a", lambda: "a")
    ahead.begin("b", lambda: "b")
    assert ahead.take("a", lambda: "read anew") == "read anew"
    assert ahead.take("b", never) == "b"
    ahead.close()


def test_an_error_is_raised_by_who_takes_it_and_the_next_try_reads(ahead: ReadAhead) -> None:
    def fail() -> str:
        raise OSError("away")

    ahead.begin("a", fail)
    ahead.begin("b", fail)
    with pytest.raises(OSError, match="away"):
        ahead.take("b", fail)
    assert ahead.take("b", lambda: "there again") == "there again"


def test_things_come_in_turn(ahead: ReadAhead) -> None:
    assert list(ahead.in_turn("square", 5, lambda index: index * index)) == [0, 1, 4, 9, 16]
    assert list(ahead.in_turn("none", 0, lambda index: index)) == []


@pytest.mark.parametrize(("on", "most"), [(True, 2), (False, 1)])
def test_of_what_comes_in_turn_the_next_is_read_and_no_more(on: bool, most: int) -> None:
    begun: list[int] = []
    ahead = ReadAhead(on=on)
    for done, _ in enumerate(ahead.in_turn("each", 6, begun.append), start=1):
        assert len(begun) <= done + most - 1
    assert begun == list(range(6))
    ahead.close()


def test_who_stops_in_the_middle_leaves_nothing_behind() -> None:
    ahead = ReadAhead(on=True)
    turn = ahead.in_turn("each", 3, lambda index: f"first {index}")
    assert next(turn) == "first 0"
    turn.close()  # type: ignore[attr-defined]
    assert next(ahead.in_turn("each", 3, _again)) == "again 0"
    assert ahead.take("each 1", lambda: "not the first's") != "first 1"
    ahead.close()


def _again(index: int) -> str:
    return f"again {index}"


def test_closing_ends_the_thread() -> None:
    before = set(threading.enumerate())
    ahead = ReadAhead(on=True)
    ahead.begin("a", lambda: "nobody takes it")
    ahead.close()
    assert set(threading.enumerate()) <= before
