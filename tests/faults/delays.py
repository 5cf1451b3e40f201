"""What faults cost in time: `python -m tests.faults.delays`. Prints Markdown tables; it takes some minutes on an idle machine.

Seconds of wall time say something of our code only where the machine has room; of a resumed job, seconds of processor time are
given, which other jobs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from counterweight.workers.errors import RequestError
from counterweight.workers.tasks.task import Task
from tests.nodes import two_workers
from tests.pipeline.tiny import LocalPool, Run, actor_pids, job_of, lengthened, run_local, write_job


@dataclass(frozen=True, slots=True)
class Timed:
    """A run. seconds: of wall time. noticed: between a fault and the word that its task is another worker's; None without."""

    seconds: float
    noticed: float | None


FORK = ("--set", "spec.resources={workers: 1, cpus_per_worker: 1}")

PLACES = {"one of two workers under Ray": two_workers(), "the worker, a fork of the command,": FORK}
"""Who is struck -> settings of its job."""


def struck(manifest: Path, output: Path, number: int | None, settings: Sequence[str], *, moment: str) -> Timed:
    """Runs a job, a worker of which is sent a signal behind a line of the log. AssertionError unless it ends well."""
    started = time.monotonic()
    run = Run(manifest, "--output", str(output), *settings)
    sent = 0.0
    if number is not None:
        run.wait_for(moment)
        os.kill(actor_pids(run.process.pid)[0], number)
        sent = time.time()
    code, _, err = run.finish()
    seconds = time.monotonic() - started
    assert code == 0, err
    retried = [event["time"] for event in _events(output) if event["kind"] == "task_retried"]
    return Timed(seconds, min(retried) - sent if number is not None and retried else None)


def _events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in output.rglob("*.jsonl") for line in path.read_text().splitlines()]


class Stopped(RequestError):
    """Stands for the end of a job's processes."""


def resumed(manifest: Path, root: Path, share: float) -> tuple[float, float, float]:
    """Processor seconds of a job that nobody disturbs; of one that ends with the first task behind a share of them; and of the
    run that goes on there."""

    def spent(output: Path, limit: float) -> float:
        began = time.process_time()

        def fault(worker: int, task: Task[Any]) -> Stopped | None:
            return Stopped("stopped") if time.process_time() - began > limit else None

        with suppress(Stopped):
            run_local(job_of(manifest, f"spec.output.uri={output}"), LocalPool(1, fault=fault))
        return time.process_time() - began

    whole = spent(root / "whole", float("inf"))
    return whole, spent(root / "stopped", share * whole), spent(root / "stopped", float("inf"))


def offsets(manifest: Path, output: Path, seeds: Sequence[int]) -> list[str]:
    """Three drivers on one job, at offsets that a seed draws over the time that it takes: what they ended with."""
    lines = []
    for seed in seeds:
        draw, place = Random(seed), output / str(seed)
        runs = []
        waits = [0.0, *sorted(draw.uniform(0, 30) for _ in range(2))]
        began = time.monotonic()
        for wait in waits:
            time.sleep(max(0.0, wait - (time.monotonic() - began)))
            runs.append(Run(manifest, "--output", str(place), "--set", "spec.resources.cpus_per_worker=1"))
        ends = [run.finish() for run in runs]
        artifacts = {out for _, out, _ in ends}
        codes = ", ".join(str(code) for code, _, _ in ends)
        shown = ", ".join(f"{wait:.1f}" for wait in waits)
        lines.append(f"| {shown} | {codes} | {len(artifacts)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind on processes")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} at the start, {len(os.sched_getaffinity(0))} cores\n")
    with tempfile.TemporaryDirectory(prefix="cw-") as folder:
        root = Path(folder)
        manifest = lengthened(write_job(root / "job", layers=options.layers))
        print("| stopped behind | whole | until it stopped | resumed | resumed / whole |\n|---|---|---|---|---|")
        run_local(job_of(manifest, f"spec.output.uri={root / 'warm'}"))  # what is imported late is imported now
        for share in options.shares:
            whole, stopped, rest = resumed(manifest, root / f"share {share}", share)
            print(f"| {share:.0%} | {whole:.1f} | {stopped:.1f} | {rest:.1f} | {rest / whole:.0%} |", flush=True)
        for who, settings in PLACES.items():
            print(f"\n| {who} is | seconds | its task is another's after | load |\n|---|---|---|---|")
            for number in range(options.rounds):
                for name, sent in (("left alone", None), ("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
                    timed = struck(manifest, root / f"{who} {name} {number}", sent, settings, moment="block 1 started")
                    noticed = "" if timed.noticed is None else f"{timed.noticed:.1f}"
                    load = os.getloadavg()[0]
                    print(f"| {name} | {timed.seconds:.1f} | {noticed} | {load:.1f} |", flush=True)
        print("\n| three drivers begin at | exit codes | artifacts |\n|---|---|---|")
        for line in offsets(manifest, root / "offsets", range(options.rounds)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
