"""What a driver leaves behind when it is killed is ended; what it leaves when it ends in peace is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from counterweight.pipeline.reaper import descendants
from tests.pipeline.tiny import alive, until

DRIVER = """
import subprocess, sys, time
from counterweight.pipeline.reaper import reaper
with reaper():
    # An agent whose parent ends, so that it is nobody's child any more when the driver is killed.
    agent = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = f"import subprocess, sys, time; subprocess.Popen({agent}); time.sleep(8)"
    own = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(float(sys.argv[1]))
"""


def started(seconds: float) -> tuple[subprocess.Popen[bytes], set[int]]:
    """A driver that ends by itself after so long, and its descendants but for the reaper."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(seconds)])

    def agents() -> set[int]:
        lines = {pid: (Path("/proc") / str(pid) / "cmdline").read_text() for pid, _ in descendants(driver.pid)}
        return {pid for pid, line in lines.items() if "reaper" not in line and "sleep" in line}

    until(lambda: len(agents()) == 2)
    return driver, agents()


def test_descendants_of_a_killed_driver_are_ended() -> None:
    driver, agents = started(600)
    until(lambda: sum(alive(pid) for pid in agents) == 1)  # the orphan
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    until(lambda: not any(map(alive, agents)), seconds=30)


def test_of_a_driver_that_ends_in_peace_nobody_is_ended() -> None:
    driver, agents = started(1)
    try:
        assert driver.wait() == 0
        with pytest.raises(AssertionError, match="waited too long"):
            until(lambda: not any(map(alive, agents)), seconds=4)
    finally:
        for pid in agents:
            os.kill(pid, signal.SIGKILL)


def test_a_shutdown_that_waits_for_a_frozen_process_of_ray_is_cut_short() -> None:
    code = """
import shutil, signal, subprocess, time
from counterweight.pipeline.reaper import LOOK_SECONDS, reaper
with reaper() as ending:
    daemon = subprocess.Popen(["ray::Daemon", "600"], executable=shutil.which("sleep"))
    own = subprocess.Popen(["sleep", "600"])
    time.sleep(LOOK_SECONDS + 2)
    daemon.send_signal(signal.SIGSTOP)
    ending()
    print(daemon.wait())
print(own.poll())
own.kill()
"""
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert ran.stdout.split() == [str(-signal.SIGKILL), "None"]


def test_a_process_of_ray_is_ended_whichever_way_its_driver_ends() -> None:
    code = """
import shutil, subprocess, time
from counterweight.pipeline.reaper import LOOK_SECONDS, reaper
with reaper():
    agent = subprocess.Popen(["ray::Agent", "600"], executable=shutil.which("sleep"))
    time.sleep(LOOK_SECONDS + 2)
print(agent.wait(20))
"""
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert int(ran.stdout) == -signal.SIGKILL
