"""What a driver leaves behind when it is killed is ended; what it leaves when it ends in peace is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from counterweight.pipeline.reaper import descendants
from tests.patience import PATIENCE
from tests.pipeline.tiny import alive, until

# A driver with a child that has a child. It tells their ids, ends the first of them when it is told to, and then itself.
DRIVER = """
import subprocess, sys
from counterweight.pipeline.reaper import reaper
CHILD = "import subprocess, time; print(subprocess.Popen(['sleep', '3600']).pid, flush=True); time.sleep(3600)"
with reaper():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, start_new_session=True)
    print(child.pid, int(child.stdout.readline()), flush=True)
    if sys.stdin.readline().strip() == "orphan":
        child.kill()
        print(child.wait(), flush=True)
        sys.stdin.readline()
"""


class Driver:
    """Runs `DRIVER`. child, grandchild, reaper: process ids of its descendants."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.child, self.grandchild = map(int, self.process.stdout.readline().split())
        (self.reaper,) = {pid for pid, _ in descendants(self.process.pid)} - {self.child, self.grandchild}

    def orphan(self) -> None:
        """Ends the child, so that the grandchild is nobody's descendant."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("orphan", file=self.process.stdin, flush=True)
        assert int(self.process.stdout.readline()) == -signal.SIGKILL

    def wait_for_a_look(self) -> None:
        """Until the reaper has looked at those that are there now. It gives the processor up when a look is over: that
        of one that may have begun before, and that of a whole one, are counted by the kernel."""
        before = _switches(self.reaper)
        until(lambda: _switches(self.reaper) >= before + 2)


def _switches(pid: int) -> int:
    """How often a process has given the processor up of its own."""
    status = (Path("/proc") / str(pid) / "status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches:")]
    return int(line.split()[1])


@pytest.fixture
def driver() -> Iterator[Driver]:
    started = Driver()
    yield started
    for pid in (started.process.pid, started.child, started.grandchild):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.process.wait()


def test_descendants_of_a_killed_driver_are_ended(driver: Driver) -> None:
    driver.wait_for_a_look()
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.process.wait()
    until(lambda: not alive(driver.child) and not alive(driver.grandchild))


def test_an_orphan_of_a_killed_driver_is_ended_too(driver: Driver) -> None:
    driver.wait_for_a_look()
    driver.orphan()
    assert alive(driver.grandchild)
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.process.wait()
    until(lambda: not alive(driver.grandchild))


def test_of_a_driver_that_ends_in_peace_nobody_is_ended(driver: Driver) -> None:
    driver.wait_for_a_look()
    assert driver.process.stdin is not None
    driver.process.stdin.close()
    assert driver.process.wait() == 0
    assert not alive(driver.reaper), "the driver waits for it, so what it ends is over or about to be"
    time.sleep(1.0)
    assert alive(driver.child)
    assert alive(driver.grandchild)


def test_a_shutdown_that_waits_for_a_frozen_process_of_ray_is_cut_short() -> None:
    """However young the process is."""
    code = """
import shutil, signal, subprocess
from counterweight.pipeline.reaper import reaper
with reaper() as ending:
    daemon = subprocess.Popen(["ray::Daemon", "3600"], executable=shutil.which("sleep"))
    own = subprocess.Popen(["sleep", "3600"])
    daemon.send_signal(signal.SIGSTOP)
    ending()
    print(daemon.wait())
print(own.poll())
own.kill()
"""
    assert ran(code) == [str(-signal.SIGKILL), "None"]


def test_a_process_of_ray_is_ended_whichever_way_its_driver_ends() -> None:
    code = """
import shutil, subprocess
from counterweight.pipeline.reaper import reaper
with reaper():
    agent = subprocess.Popen(["ray::Agent", "3600"], executable=shutil.which("sleep"))
print(agent.wait())
"""
    assert ran(code) == [str(-signal.SIGKILL)]


def ran(code: str) -> list[str]:
    """The words that a process prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=True)
    return done.stdout.split()
