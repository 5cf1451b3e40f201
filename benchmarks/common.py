"""What every benchmark says about itself: machine, versions, command; and where results are written."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
