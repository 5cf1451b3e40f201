"""Ends what an embedded Ray leaves behind when its driver is killed, or a daemon was frozen: agents would live on for a minute.

A process of its own, started from this file alone: it must be there when the driver is not. It reads from a pipe whose other
end only the driver holds, and looks meanwhile who the driver's descendants are.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_SECONDS = 5.0
GRACE_SECONDS = 2.0
"""What ends by itself may do so."""
SHUTDOWN_SECONDS = 30.0
"""That Ray may take to shut down. It takes one or two, and waits for ever for a raylet that is frozen."""
LEFT_SECONDS = 0.05
"""Between two looks at what is left."""

ENDING, DONE = b"e", b"d"
"""What the driver says through the pipe; nothing when it is killed."""

Process = tuple[int, int]
"""Its id, and when it was started: ids are given out again."""


@contextmanager
def reaper() -> Iterator[Callable[[], None]]:
    """Watches over this process's descendants as long as the context lasts. Behind it none of Ray's is left; others may be, if
    this process lives. Gives what is to be called before Ray is shut down: what takes longer than `SHUTDOWN_SECONDS` then is
    cut short, because Ray's processes are killed."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the driver's group is not for it
    ) as process:
        assert process.stdin is not None
        pipe = process.stdin.fileno()

        def tell(word: bytes) -> None:
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, word)

        try:
            yield lambda: tell(ENDING)
        finally:
            tell(DONE)
            process.stdin.close()


def descendants(ancestor: int) -> set[Process]:
    """Those of a process that run now."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (found := _stat(int(entry.name))) is not None:
            parent, started = found
            children.setdefault(parent, []).append((int(entry.name), started))
    found_all: set[Process] = set()
    waiting = [ancestor]
    while waiting:
        for process in children.get(waiting.pop(), []):
            found_all.add(process)
            waiting.append(process[0])
    return found_all


def _stat(pid: int) -> tuple[int, int] | None:
    """A process's parent and start; None when it is gone."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[1]), int(fields[19])) if fields[0] != "Z" else None


def _watch(driver: int) -> None:
    """Until the driver says that it is done, or is gone; then ends those that are left: all of them, or Ray's."""
    known: set[Process] = set()
    own = os.getpid()
    ended = False
    while not ended:
        # Kept from look to look: whose parent has died is nobody's descendant any more.
        known |= descendants(driver)
        known = _left(known)
        ended = bool(select.select([0], [], [], LOOK_SECONDS)[0])
    # A driver that speaks is still there, and so are its descendants that are younger than the last look.
    known |= descendants(driver)
    word = os.read(0, 1)
    if word == ENDING:
        if not select.select([0], [], [], SHUTDOWN_SECONDS)[0]:
            _kill({process for process in known if _is_of_ray(process[0])})
        word = os.read(0, 1)
    if word == DONE:
        known = {process for process in known if _is_of_ray(process[0])}
    known = {process for process in known if process[0] != own}
    deadline = time.monotonic() + GRACE_SECONDS
    while known and time.monotonic() < deadline:
        time.sleep(LEFT_SECONDS)
        known = _left(known)
    _kill(known)


def _kill(known: set[Process]) -> None:
    for pid, _ in _left(known):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _left(known: set[Process]) -> set[Process]:
    """Those that still run."""
    return {(pid, started) for pid, started in known if (stat := _stat(pid)) and stat[1] == started}


def _is_of_ray(pid: int) -> bool:
    """Whether it is a worker or an agent, which have this name, or a daemon."""
    try:
        name = (Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return name.startswith("ray::") or "/ray/core/src/ray/" in name


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
