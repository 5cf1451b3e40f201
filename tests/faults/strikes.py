"""What befalls the processes of a run on an embedded Ray, and when."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

from counterweight.pipeline.reaper import descendants
from tests.faults.variants import TRAINED
from tests.networks import Network
from tests.patience import PATIENCE
from tests.pipeline.tiny import Run, actor_pids, memory_of

STAYS = 100_000
"""Times that a fault happens which does not go away by itself."""

LAST = "stage publish"
"""The moment behind which a job is over at once."""

_MOMENTS = ("stage inventory", "block 0 started", "block 1 started", "stage assemble", "stage validate", LAST)

Beside = Callable[[], object]
"""Runs the same job to its end, in this process."""

Strike = Callable[[Run, Random, Beside], tuple[int, ...]]
"""Does it; gives back the exit codes that the run may have then, beside 0; none of them where nobody was there any more."""


def moments(variant: str) -> tuple[str, ...]:
    """Lines of a job's log, behind which its processes meet their fate."""
    return (*_MOMENTS, "stage distill") if variant == TRAINED else _MOMENTS


def reached(run: Run, text: str) -> bool:
    """Whether the job gets there, and still runs."""
    deadline = time.monotonic() + PATIENCE
    while text not in run.stderr:
        if run.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"no {text!r}: {run.stderr}"
        time.sleep(0.005)
    return run.process.poll() is None


def _kill_driver(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    os.kill(run.process.pid, signal.SIGKILL)
    return (-signal.SIGKILL,)


def _kill_group(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    run.kill()
    return (-signal.SIGKILL,)


def _terminate(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    os.kill(run.process.pid, draw.choice((signal.SIGTERM, signal.SIGINT)))
    return (143, 130)


def _freeze_driver(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    """For as long as another driver takes to finish the job, and a while."""
    os.kill(run.process.pid, signal.SIGSTOP)
    try:
        beside()
        time.sleep(draw.choice((0.0, draw.uniform(0, 30))))
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    return (4,)


def _kill_worker(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    return _send(actor_pids(run.process.pid), signal.SIGKILL, draw)


def _freeze_worker(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    return _send(actor_pids(run.process.pid), signal.SIGSTOP, draw)


def _stop_worker(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    """For a while: it may be given up by then."""
    found = _send(pids := actor_pids(run.process.pid), signal.SIGSTOP, draw)
    if found:
        _wait(run, draw.uniform(0, 20))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return found


def _limit_worker(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    """The system refuses it memory from now on, beyond a little."""
    try:
        pid = draw.choice(actor_pids(run.process.pid))
        limit = memory_of(pid, "VmSize") + draw.choice((0, draw.randrange(64 << 20)))
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    except (IndexError, ProcessLookupError):
        return ()
    return (4,)


def _out_of_memory(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    """Whichever worker grows beyond a limit is killed, as the kernel does it; every time, or up to three times."""
    sizes = [memory_of(pid, "VmRSS") for pid in actor_pids(run.process.pid)]
    limit = max(sizes, default=0) * draw.uniform(0.7, 1.02)
    killed, times = set[int](), draw.choice((1, 2, 3, STAYS))
    while len(killed) < times and run.process.poll() is None:
        for pid in actor_pids(run.process.pid):
            with suppress(ProcessLookupError):
                if pid not in killed and memory_of(pid, "VmRSS") > limit:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(0.005)
    return (4,) if killed else ()


def _strike(name: str, number: int, run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
    """One of Ray's own processes."""
    return _send([pid for pid, _ in descendants(run.process.pid) if name in _command(pid)], number, draw)


def _send(pids: list[int], number: int, draw: Random) -> tuple[int, ...]:
    """To one of them; it may be over by now."""
    try:
        os.kill(draw.choice(pids), number)
    except (IndexError, ProcessLookupError):
        return ()
    return (4,)


def _wait(run: Run, seconds: float) -> None:
    """So long, or until the run is over."""
    with suppress(subprocess.TimeoutExpired):
        run.process.wait(seconds)


def _command(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


_STRIKES: dict[str, Strike] = {
    "driver killed": _kill_driver,
    "driver and all around it killed": _kill_group,
    "driver terminated": _terminate,
    "driver frozen": _freeze_driver,
    "worker killed": _kill_worker,
    "worker out of memory, killed": _out_of_memory,
    "worker out of memory, refused": _limit_worker,
}

UNDER_RAY: dict[str, Strike] = _STRIKES | {
    "worker frozen": _freeze_worker,
    "raylet killed": partial(_strike, "raylet", signal.SIGKILL),
    "raylet frozen": partial(_strike, "raylet", signal.SIGSTOP),
    "head killed": partial(_strike, "gcs_server", signal.SIGKILL),
    "head frozen": partial(_strike, "gcs_server", signal.SIGSTOP),
}

FORKED: dict[str, Strike] = _STRIKES | {"worker frozen": _freeze_worker, "worker frozen for a while": _stop_worker}
"""Where the worker is a fork of the driver."""


def cut(network: Network, hosts: tuple[int, ...]) -> Strike:
    """One of these hosts is cut off for a while, or until the run is over."""

    def strike(run: Run, draw: Random, beside: Beside) -> tuple[int, ...]:
        host, seconds = draw.choice(hosts), draw.choice((draw.uniform(0.2, 8), draw.uniform(8, 30)))
        network.cut(host)
        try:
            _wait(run, seconds)
        finally:
            network.heal(host)
        return (4,)

    return strike
