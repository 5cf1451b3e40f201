"""Whole `counterweight run` processes of two revisions, one after the other in pairs: is the second slower than the first?

    python benchmarks/pairs.py --before ../before --manifest manifests/demo.yaml --record

`--before` is a checkout of the other revision that has the package's folder; both run with this environment's libraries. CPU
seconds are of the command and of Ray's daemons, but not of its workers, whom their parent does not wait for.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from common import ROOT, machine, record, table, versions

PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl(2): orphans of our children become ours, so that none is left when the next run begins."""

COMMAND = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from counterweight.pipeline.cli import main; sys.exit(main())"
)


def run(checkout: Path, manifest: Path, overrides: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run into an empty place."""
    with tempfile.TemporaryDirectory() as output:
        chosen = [part for override in overrides for part in ("--set", override)]
        arguments = ["run", str(manifest), "--output", Path(output).as_uri(), *chosen]
        before, started = cpu_seconds(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", COMMAND, str(checkout), *arguments],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        wall = time.perf_counter() - started
        with suppress(ChildProcessError):
            while True:
                os.wait()
        return wall, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path)
    parser.add_argument("--after", default=ROOT, type=Path)
    parser.add_argument("--manifest", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], help="a field of the manifest, as for `run`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    about = f"{machine()}. {versions('torch', 'transformers', 'ray')}."
    checkouts = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    for repeat in range(arguments.repeats):
        order = list(checkouts) if repeat % 2 == 0 else list(reversed(checkouts))
        for name in order:
            found[name].append(run(checkouts[name], arguments.manifest.resolve(), arguments.set))
            print(name, "{:.2f} s wall, {:.2f} s CPU".format(*found[name][-1]), flush=True)
    rows = [
        [
            name,
            revision(checkouts[name]),
            *(f"{statistics.median(run[unit] for run in runs):.2f}" for unit in (0, 1)),
            ", ".join(f"{wall:.1f}" for wall, _ in runs),
        ]
        for name, runs in found.items()
    ]
    ratios = [
        statistics.median(after[unit] / before[unit] for before, after in zip(*found.values(), strict=True))
        for unit in (0, 1)
    ]
    body = table(["", "revision", "wall, median s", "CPU, median s", "every run's wall"], rows)
    body += f"\n\nMedian of the pairs' ratios, after / before: wall {ratios[0]:.3f}, CPU {ratios[1]:.3f}."
    print(body)
    if arguments.record:
        title = f"Whole process of {arguments.manifest.stem}, two revisions"
        print(record(f"pairs-{arguments.manifest.stem}", title, body, about))


def revision(checkout: Path) -> str:
    """The commit of a checkout, short."""
    found = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
