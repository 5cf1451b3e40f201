"""What befalls the processes of a run on an embedded Ray, and when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from counterweight.pipeline.reaper import descendants
from tests.patience import PATIENCE
from tests.pipeline.tiny import Run, actor_pids

MOMENTS = ("stage inventory", "block 0 started", "block 1 started", "stage assemble", "stage validate", "stage publish")
"""Lines of a job's log, behind which its processes meet their fate."""

Strike = Callable[[Run, Random], tuple[int, ...]]
"""Does it; gives back the exit codes that the run may have then, beside 0."""


def reached(run: Run, text: str) -> bool:
    """Whether the job gets there before it ends."""
    deadline = time.monotonic() + PATIENCE
    while text not in run.stderr:
        if run.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"no {text!r}: {run.stderr}"
        time.sleep(0.005)
    return True


def _kill_driver(run: Run, draw: Random) -> tuple[int, ...]:
    os.kill(run.process.pid, signal.SIGKILL)
    return (-signal.SIGKILL,)


def _kill_group(run: Run, draw: Random) -> tuple[int, ...]:
    run.kill()
    return (-signal.SIGKILL,)


def _terminate(run: Run, draw: Random) -> tuple[int, ...]:
    os.kill(run.process.pid, draw.choice((signal.SIGTERM, signal.SIGINT)))
    return (143, 130)


def _kill_worker(run: Run, draw: Random) -> tuple[int, ...]:
    _send(actor_pids(run.process.pid), signal.SIGKILL, draw)
    return (4,)


def _freeze_worker(run: Run, draw: Random) -> tuple[int, ...]:
    _send(actor_pids(run.process.pid), signal.SIGSTOP, draw)
    return (4,)


def _strike(name: str, number: int, run: Run, draw: Random) -> tuple[int, ...]:
    """One of Ray's own processes."""
    _send([pid for pid, _ in descendants(run.process.pid) if name in _command(pid)], number, draw)
    return (4,)


def _send(pids: list[int], number: int, draw: Random) -> None:
    """To one of them; it may be over by now."""
    if pids:
        try:
            os.kill(draw.choice(pids), number)
        except ProcessLookupError:
            return


def _command(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


STRIKES: dict[str, Strike] = {
    "driver killed": _kill_driver,
    "driver and all around it killed": _kill_group,
    "driver terminated": _terminate,
    "worker killed": _kill_worker,
    "worker frozen": _freeze_worker,
    "raylet killed": partial(_strike, "raylet", signal.SIGKILL),
    "raylet frozen": partial(_strike, "raylet", signal.SIGSTOP),
    "head killed": partial(_strike, "gcs_server", signal.SIGKILL),
    "head frozen": partial(_strike, "gcs_server", signal.SIGSTOP),
}
