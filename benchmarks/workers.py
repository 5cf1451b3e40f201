"""One job on one worker and on several, one after the other in pairs: how many times faster are the blocks, and the whole?

    python benchmarks/workers.py --manifest manifests/reference-mixtral-w4a16-g128.yaml [--workers 2] [--repeats 3] [--record]
        [--address none]

Every worker has one CPU, and runs begin in an empty place. Seconds are the report's own, stage by stage; the whole is their
sum, which begins when the workers have answered. The original runs over the validation's windows as soon as a worker has
nothing else to do, in whatever stage that is, so that only sums of stages compare. Artifacts of all runs must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common import machine, record, table, versions

BLOCKS = "blocks"


def run(
    manifest: Path, workers: int, overrides: list[str], address: str | None
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """Of the artifact file -> sha256, without its report, which has times; and stage -> seconds."""
    resources = [f"spec.resources.workers={workers}", "spec.resources.cpus_per_worker=1"]
    chosen = [part for override in (*resources, *overrides) for part in ("--set", override)]
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            "-m",
            "counterweight.pipeline.cli",
            "run",
            str(manifest),
            "--output",
            output,
            *([] if address is None else ["--address", address]),
            *chosen,
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        place = Path(done.stdout.split()[-1].removeprefix("file://"))
        files = json.loads((place / "artifact.json").read_text(encoding="utf-8"))["files"]
        report = json.loads((place / "report" / "report.json").read_text(encoding="utf-8"))
    digests = {name: file["sha256"] for name, file in files.items() if not name.startswith("report/")}
    return digests, report["stages"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], help="a field of the manifest, as for `run`")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--address", help="as for `run`, of all runs; default: what it chooses, Ray for several workers"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers', 'ray')}."
    found: dict[int, list[Mapping[str, float]]] = {1: [], arguments.workers: []}
    artifacts: list[Mapping[str, str]] = []
    for repeat in range(arguments.repeats):
        for workers in list(found) if repeat % 2 == 0 else list(reversed(found)):
            artifact, stages = run(arguments.manifest.resolve(), workers, arguments.set, arguments.address)
            artifacts.append(artifact)
            found[workers].append(stages)
            print(f"{workers} workers: blocks {stages[BLOCKS]:.2f} s, all {sum(stages.values()):.2f} s", flush=True)
    if any(artifact != artifacts[0] for artifact in artifacts):
        raise SystemExit("the runs' artifacts differ: expected the same bytes")
    rows = []
    names = tuple(found[1][0])
    parts = {name: (name,) for name in names} | {"from blocks on": names[names.index(BLOCKS) :], "all": names}
    for stage, summed in parts.items():
        seconds = [[sum(one[name] for name in summed) for one in runs] for runs in found.values()]
        ratios = [one / several for one, several in zip(*seconds, strict=True)]
        medians = [f"{statistics.median(own):.2f}" for own in seconds]
        rows.append([stage, *medians, f"{statistics.median(ratios):.2f}", ", ".join(f"{r:.2f}" for r in ratios)])
    header = ["stage", "1 worker, s", f"{arguments.workers} workers, s", "times faster, median of pairs", "every pair"]
    body = table(header, rows) + f"\n\n{len(artifacts[0])} files of the artifact have the same bytes in all runs."
    print(body)
    if arguments.record:
        forks = "-forks" if arguments.address == "none" else ""
        print(record(f"workers-{arguments.manifest.stem}{forks}", f"{arguments.workers} workers and one", body, about))


if __name__ == "__main__":
    main()
