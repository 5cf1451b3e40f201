"""Ordered, bounded parallel maps whose results do not depend on the number of threads.

On a CPU a worker runs its shards and its solves on a few threads, each of which computes with one thread inside torch:
an operation then has the same bits whatever the thread count, and the order of reductions is the order of the items. Threads
that find no shard or solve to begin take parts of one that another has begun (`OrderedPool.share`).
On a GPU one thread computes, because the device is the parallel part; others read and write shards meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

AHEAD, BEHIND = 2, 4
"""Shards that are read while another one is computed, and that are hashed and written, where one thread computes. A worker
hashes 1.2 to 1.8 GB a second on one thread (`benchmarks/time_model.py`); a block of Llama-3-8B runs over some 4 GB a second at
an H100's rates. What is read may come from memory, where nothing is hashed; what is made always is."""

READERS = 8
"""Requests for a checkpoint's tensors, or an artifact's files, in flight, and threads that verify what came: in pieces of
`checkpoint.ranges.MAX_READ` 64 MiB are held beside the tensors. Where workers of a machine read the same, each verifies all of
it: eight GPUs' host has a dozen cores for each."""

PIECE_TOKENS = 1024
"""Tokens of a shard that one thread of a CPU runs at a time. Part of the numerics, because products of other shapes may have
other bits. A block of the reference Llama over 32 x 256 tokens takes 0.287 CPU s at once, and 0.249, 0.232 and 0.241 in pieces
of 2048, 1024 and 512 tokens, whose activations a cache holds; of the small Mixtral 0.230, and 0.203, 0.222 and 0.275."""

FEW_TOKENS = 1024
"""Of a shard, that an expert sees on average: with fewer, experts run together on a GPU. Qwen3-30B-A3B's 128, 512 tokens each,
took 54 ms a shard one by one on an H200, of which the device needs some 11. Of Mixtral's 8, 2048 tokens each, the device is
what takes long, and a library's products are faster there."""

T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")
R = TypeVar("R")
W = TypeVar("W")


Share = Callable[[Sequence[Callable[[], R]]], list[R]]
"""Does all parts of a work, in any order; what they return, in theirs."""


def in_turn(parts: Sequence[Callable[[], R]]) -> list[R]:
    """A `Share` of this thread alone."""
    return [part() for part in parts]


def piece_sequences(length: int, tokens: int = PIECE_TOKENS) -> int:
    """Sequences of `length` tokens in one piece of so many `tokens`; one where a single sequence is longer."""
    return max(1, tokens // length)


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Results in the order of `items`, by `READERS` threads; the first failure cancels what has not begun."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(work, items)


class OrderedPool:
    """`threads` workers that map in order, never holding more than `threads` results that nobody has taken."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads: {threads}: expected at least 1")
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="block") if threads > 1 else None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of `items`; the first exception is raised where its result would have stood."""
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def share(self, parts: Sequence[Callable[[], R]]) -> list[R]:
        """See `Share`. This thread does them, and so do threads of the pool that have nothing else to do, so that parts may be
        shared again. The failure of the first part that fails is raised when none is being done any more."""
        if self._executor is None or len(parts) < 2:
            return in_turn(parts)
        left, done, failed = deque(range(len(parts))), dict[int, R](), dict[int, BaseException]()

        def take() -> None:
            while left:
                try:
                    place = left.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    done[place] = parts[place]()
                except BaseException as error:  # noqa: BLE001  raised by the thread that shares
                    failed[place] = error
                    left.clear()

        helping = [self._executor.submit(take) for _ in range(min(self.threads, len(parts)) - 1)]
        take()
        for helper in helping:
            if not helper.cancel():
                helper.result()
        if failed:
            raise failed[min(failed)]
        return [done[place] for place in range(len(parts))]

    def close(self) -> None:
        """Waits for running items and ends the threads."""
        if self._executor is not None:
            self._executor.shutdown()


class Shards(Protocol):
    """How a worker goes through shards: each is read, computed and written, and results are taken in the shards' order."""

    computing: int
    """How many threads compute at a time."""

    piece_tokens: int | None
    """Of a shard, that a thread runs at a time; None: all."""

    def share(self, parts: Sequence[Callable[[], R]]) -> list[R]:
        """See `Share`; called while a shard is computed."""
        ...

    def run(
        self,
        items: Sequence[T],
        read: Callable[[T], In],
        compute: Callable[[In], tuple[R, Out]],
        take: Callable[[R], None],
        write: Callable[[Out], W],
    ) -> list[W]:
        """What `write` makes of each output. read, compute and write: called by any thread. take: by this one, in order, with
        what `compute` gives beside the output."""
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


class SideBySide:
    """Several threads, each of which reads, computes and writes a shard, or takes parts of another's."""

    piece_tokens: int | None = PIECE_TOKENS

    def __init__(self, pool: OrderedPool) -> None:
        self.computing = pool.threads
        self._pool = pool

    def share(self, parts: Sequence[Callable[[], R]]) -> list[R]:
        """See `OrderedPool.share`."""
        return self._pool.share(parts)

    def run(
        self,
        items: Sequence[T],
        read: Callable[[T], In],
        compute: Callable[[In], tuple[R, Out]],
        take: Callable[[R], None],
        write: Callable[[Out], W],
    ) -> list[W]:
        def whole(item: T) -> tuple[R, W]:
            found, output = compute(read(item))
            return found, write(output)

        written = []
        for found, place in self._pool.map(whole, items):
            take(found)
            del found  # before the next one is waited for
            written.append(place)
        return written

    def close(self) -> None:
        """The pool is its owner's."""


class Overlapped:
    """This thread computes; others read up to `AHEAD` shards before it and write up to `BEHIND` behind it."""

    computing = 1
    piece_tokens: int | None = None

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(AHEAD, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(BEHIND, thread_name_prefix="write")

    def run(
        self,
        items: Sequence[T],
        read: Callable[[T], In],
        compute: Callable[[In], tuple[R, Out]],
        take: Callable[[R], None],
        write: Callable[[Out], W],
    ) -> list[W]:
        left = iter(items)
        reading = deque(self._readers.submit(read, item) for item in islice(left, AHEAD))
        writing: deque[Future[W]] = deque()
        written: list[W] = []
        try:
            while reading:
                item = reading.popleft().result()
                reading.extend(self._readers.submit(read, following) for following in islice(left, 1))
                found, output = compute(item)
                take(found)
                del item, found
                writing.append(self._writers.submit(write, output))
                del output
                if len(writing) > BEHIND:
                    written.append(writing.popleft().result())
            written.extend(future.result() for future in writing)
            return written
        finally:
            for waiting in (reading, writing):
                for future in waiting:
                    future.cancel()

    def share(self, parts: Sequence[Callable[[], R]]) -> list[R]:
        """One after the other."""
        return in_turn(parts)

    def close(self) -> None:
        """Waits for what is read and written and ends the threads."""
        self._readers.shutdown()
        self._writers.shutdown()
