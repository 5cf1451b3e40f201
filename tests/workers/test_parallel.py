"""Maps in order, on any number of threads, without running ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from counterweight.workers.parallel import AHEAD, BEHIND, OrderedPool, Overlapped, Shards, SideBySide
from tests.patience import PATIENCE


@pytest.fixture(params=[1, 2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[OrderedPool]:
    opened = OrderedPool(request.param)
    yield opened
    opened.close()


def test_results_come_in_the_order_of_the_items(pool: OrderedPool) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0.0)
        return item * item

    assert list(pool.map(slow_first, range(12))) == [item * item for item in range(12)]


def test_nothing_gives_nothing(pool: OrderedPool) -> None:
    assert list(pool.map(str, [])) == []


def test_at_most_one_more_than_threads_is_out(pool: OrderedPool) -> None:
    """Shards are loaded by the function, so what has begun and was not taken is what is in memory."""
    begun: list[int] = []
    results = pool.map(begun.append, range(20))
    for taken in range(1, 21):
        next(results)
        time.sleep(0.002)
        assert len(begun) <= taken + pool.threads


def test_items_are_drawn_as_they_are_needed(pool: OrderedPool) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            drawn.append(item)
            yield item

    results = pool.map(lambda item: item, items())
    next(results)
    assert len(drawn) <= 2 + pool.threads
    results.close()


def test_the_first_failure_is_raised_in_its_place(pool: OrderedPool) -> None:
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise KeyError("three")
        return item

    results = pool.map(fail_at_three, range(50))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)


def test_a_failure_stops_what_has_not_begun(pool: OrderedPool) -> None:
    begun: list[int] = []

    def fail(item: int) -> None:
        begun.append(item)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        list(pool.map(fail, range(50)))
    pool.close()
    assert len(begun) <= pool.threads + 1


def test_threads_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=PATIENCE)
    pool = OrderedPool(3)
    assert sorted(pool.map(lambda _: barrier.wait(), range(3))) == [0, 1, 2]
    pool.close()


def test_parts_are_shared_and_come_back_in_their_order(pool: OrderedPool) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0.0)
        return item

    assert pool.share([partial(slow_first, item) for item in range(9)]) == list(range(9))
    assert pool.share([]) == []


def test_all_threads_take_parts_and_may_share_theirs() -> None:
    pool, barrier, inner = (
        OrderedPool(3),
        threading.Barrier(3, timeout=PATIENCE),
        threading.Barrier(3, timeout=PATIENCE),
    )
    assert sorted(pool.share([barrier.wait] * 3)) == [0, 1, 2]
    # Of whoever shares while another is busy, or has nothing to do.
    assert list(pool.map(lambda _: sum(pool.share([lambda: 1] * 20)), range(6))) == [20] * 6
    assert sorted(next(iter(pool.map(lambda _: pool.share([inner.wait] * 3), [0])))) == [0, 1, 2]
    pool.close()


def test_the_failure_of_a_part_is_raised_when_no_other_is_being_done(pool: OrderedPool) -> None:
    doing: list[int] = []

    def fail(item: int) -> int:
        doing.append(item)
        if item == 1:
            raise KeyError(item)
        time.sleep(0.01)
        doing.remove(item)
        return item

    with pytest.raises(KeyError, match="1"):
        pool.share([partial(fail, item) for item in range(50)])
    assert doing == [1]


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    pool = OrderedPool(3)
    list(pool.map(str, range(5)))
    pool.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads: {threads}: expected at least 1"):
        OrderedPool(threads)


@pytest.fixture(params=["side by side", "overlapped"])
def shards(request: pytest.FixtureRequest, pool: OrderedPool) -> Iterator[Shards]:
    opened = SideBySide(pool) if request.param == "side by side" else Overlapped()
    yield opened
    opened.close()


def test_shards_are_read_computed_taken_and_written_in_their_order(shards: Shards) -> None:
    taken: list[int] = []

    def slow(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0.0)
        return item + 1

    written = shards.run(range(12), slow, lambda entered: (entered, -entered), taken.append, slow)
    assert taken == list(range(1, 13))
    assert written == [-item for item in range(12)]
    assert shards.run([], slow, lambda entered: (entered, entered), taken.append, slow) == []


@pytest.mark.parametrize("where", ["read", "compute", "take", "write"])
def test_a_failure_at_any_step_is_raised(where: str, shards: Shards) -> None:
    def at(step: str) -> Callable[[int], int]:
        def fail(item: int) -> int:
            if step == where and item == 3:
                raise KeyError(step)
            return item

        return fail

    def compute(item: int) -> tuple[int, int]:
        return (at("compute")(item),) * 2

    with pytest.raises(KeyError, match=where):
        shards.run(range(20), at("read"), compute, at("take"), at("write"))


def test_others_read_and_write_while_one_computes() -> None:
    """The third is read, and the first is being written, before the second is through."""
    third_is_read, second_is_computed = threading.Event(), threading.Event()

    def read(item: int) -> int:
        if item == 2:
            third_is_read.set()
        return item

    def compute(item: int) -> tuple[None, int]:
        if item == 1:
            assert third_is_read.wait(PATIENCE)
            second_is_computed.set()
        return None, item

    def write(item: int) -> bool:
        return item != 0 or second_is_computed.wait(PATIENCE)

    overlapped = Overlapped()
    assert overlapped.run(range(4), read, compute, lambda _: None, write) == [True] * 4
    overlapped.close()


def test_reading_and_writing_do_not_run_away() -> None:
    """What was read and is not computed yet, and what was computed and is not written yet, is in memory."""
    read, computed, written = [], [], []

    def compute(item: int) -> tuple[None, int]:
        time.sleep(0.002)
        assert len(read) <= len(computed) + AHEAD + 1
        assert len(computed) <= len(written) + BEHIND + 1
        computed.append(item)
        return None, item

    def reading(item: int) -> int:
        read.append(item)
        return item

    overlapped = Overlapped()
    overlapped.run(range(20), reading, compute, lambda _: None, written.append)
    overlapped.close()
    assert written == list(range(20))


def test_overlapping_ends_its_threads() -> None:
    before = set(threading.enumerate())
    overlapped = Overlapped()
    overlapped.run(range(5), int, lambda item: (item, item), lambda _: None, str)
    overlapped.close()
    assert set(threading.enumerate()) <= before
