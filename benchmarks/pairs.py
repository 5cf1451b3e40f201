"""Whole `counterweight run` processes of two revisions, one after the other in pairs: is the second slower than the first?

    python benchmarks/pairs.py --before ../before --manifest manifests/demo.yaml --record

`--before` is a checkout of the other revision that has the package's folder; both run with this environment's libraries. CPU
seconds are of the command and of all that it starts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, Usage, adopt_orphans, machine, matrix_rates, measured, record, table, versions

COMMAND = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from counterweight.pipeline.cli import main; sys.exit(main())"
)


def run(checkout: Path, manifest: Path, overrides: list[str]) -> Usage:
    """One run into an empty place."""
    with tempfile.TemporaryDirectory() as output:
        chosen = [part for override in overrides for part in ("--set", override)]
        arguments = ["run", str(manifest), "--output", Path(output).as_uri(), *chosen]
        command = [sys.executable, "-c", COMMAND, str(checkout), *arguments]
        return measured(command, checkout, {"PYTHONPATH": str(checkout)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path)
    parser.add_argument("--after", default=ROOT, type=Path)
    parser.add_argument("--manifest", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], help="a field of the manifest, as for `run`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    adopt_orphans()
    about = f"{machine()}. {versions('torch', 'transformers', 'ray')}. {matrix_rates()}"
    checkouts = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    found: dict[str, list[Usage]] = {name: [] for name in checkouts}
    for repeat in range(arguments.repeats):
        order = list(checkouts) if repeat % 2 == 0 else list(reversed(checkouts))
        for name in order:
            found[name].append(run(checkouts[name], arguments.manifest.resolve(), arguments.set))
            print(f"{name} {found[name][-1].wall:.2f} s wall, {found[name][-1].cpu:.2f} s CPU", flush=True)
    rows = [
        [
            name,
            revision(checkouts[name]),
            f"{statistics.median(run.wall for run in runs):.2f}",
            f"{statistics.median(run.cpu for run in runs):.2f}",
            ", ".join(f"{run.wall:.1f}" for run in runs),
        ]
        for name, runs in found.items()
    ]
    pairs = list(zip(*found.values(), strict=True))
    wall = statistics.median(after.wall / before.wall for before, after in pairs)
    cpu = statistics.median(after.cpu / before.cpu for before, after in pairs)
    body = table(["", "revision", "wall, median s", "CPU, median s", "every run's wall"], rows)
    body += f"\n\nMedian of the pairs' ratios, after / before: wall {wall:.3f}, CPU {cpu:.3f}."
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
