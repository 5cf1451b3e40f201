"""What every benchmark says about itself: machine, versions, command; and where results are written."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl(2): orphans of our children become ours, so that none is left when the next run begins."""


def adopt_orphans() -> None:
    """What the children of this process leave behind is counted with them, see `measured`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a command with all that it has started. wall, cpu: seconds. peak: bytes of its largest process."""

    wall: float
    cpu: float
    peak: int
    last_line: str


def measured(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Usage:
    """Runs a command in `folder`, with further variables, while this process has no other children; CalledProcessError, with
    what it said, where it fails. last_line: of its stdout. Python keeps its byte code, as it has that of packages that pip
    installs: a checkout would be compiled again for each run where the environment says otherwise."""
    cpu, peak, code = 0.0, 0, 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environment}
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=complained)
        wall = 0.0
        with suppress(ChildProcessError):
            while True:
                process, status, used = os.wait4(-1, 0)
                if process == child.pid:
                    wall, code = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
                    child.returncode = code
                cpu += used.ru_utime + used.ru_stime
                peak = max(peak, used.ru_maxrss * 1024)
        said.seek(0)
        complained.seek(0)
        if code:
            raise subprocess.CalledProcessError(code, list(command), said.read(), complained.read())
        return Usage(wall, cpu, peak, (said.read().splitlines() or [""])[-1])


def matrix_rates() -> str:
    """What this machine's processor multiplies matrices at, on one thread, by torch: a line for people."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
        seconds = []
        for _ in range(4):
            before = time.process_time()
            matrix @ matrix
            seconds.append(time.process_time() - before)
        found.append(f"{str(dtype).removeprefix('torch.')} {2 * 1024**3 / min(seconds) / 1e9:.0f}")
    torch.set_num_threads(threads)
    return f"Products of matrices, 1e9 operations a second on one thread: {', '.join(found)}."


def machine() -> str:
    """One line: processor, cores, memory, load at the start."""
    model = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GiB, {platform.system()}; load {os.getloadavg()[0]:.1f} at the start"


def versions(*names: str) -> str:
    """Python's and the named packages' versions."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)])


def revision() -> str:
    """Of this checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def environment(root: Path, requirements: Sequence[str]) -> str:
    """The interpreter of a virtual environment with these requirements, made when it is missing."""
    python = root / "bin" / "python"
    if not (root / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        (root / "installed").touch()
    return str(python)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def record(name: str, title: str, body: str, about: str) -> Path:
    """Writes a dated result file and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}.md"
    command = "python " + " ".join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *map(_shown, sys.argv[1:])])
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`",
        "",
        about,
        f"Revision {revision()}.",
        "",
        body,
        "",
    ]
    path.write_text("\n".join(lines))
    return path


def _shown(argument: str) -> str:
    """An argument as it may be published: of an absolute path or file URI its last two parts; the rest is the machine's."""
    path = argument.removeprefix("file://")
    return f"…/{'/'.join(Path(path).parts[-2:])}" if path.startswith("/") else argument
