"""Injects faults by seed: `python -m tests.faults --seeds 0:500`. Each seed is one fault at one moment; the kinds take turns.
How each job ended is printed, with a traceback where that is not as it should be; the counts come last."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.faults.drills import Drills
from tests.faults.processes import ProcessDrills
from tests.faults.site import BUCKET, NOTHING, Drill, Site
from tests.servers import ceph_server, moto_server


@contextmanager
def made(root: Path, server: str) -> Iterator[tuple[dict[str, Drill], dict[str, Drill]]]:
    """Name -> drill, on a server of this name: those whose workers are in this process, and those of processes."""
    ceph = root / "ceph" if server == "ceph" else None
    with moto_server() if ceph is None else ceph_server(ceph) as running:
        site = Site(root, running.with_bucket(BUCKET))
        yield Drills(site, ceph).kinds, ProcessDrills(site).kinds


def main() -> int:
    """Exit code 1 when something was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:500", help="from:to, without the last")
    parser.add_argument("--kind", default=None, help="this one only")
    parser.add_argument("--without-processes", action="store_true", help="only drills with workers in this process")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further one then")
    default = "moto" if shutil.which("radosgw") is None else "ceph"
    parser.add_argument("--server", choices=("moto", "ceph"), default=default)
    options = parser.parse_args()
    first, last = map(int, options.seeds.split(":"))
    ends: dict[str, Counter[str]] = {}
    failures: list[str] = []
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="cw-") as root, made(Path(root), options.server) as (local, processes):
        kinds = local if options.without_processes else local | processes
        names = [options.kind] if options.kind else list(kinds)
        for seed in range(first, last):
            if time.monotonic() > end:
                break
            name = names[seed % len(names)]
            try:
                ended = kinds[name](Random(seed))
            except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
                ended = "FAILED"
                failures.append(f"{name} {seed}")
                print(f"kind {name}, seed {seed}\n{traceback.format_exc()}", flush=True)
            ends.setdefault(name, Counter())[ended] += 1
            print(f"{seed} {name}: {ended}", flush=True)
    for name, counts in ends.items():
        print(f"{name}: {', '.join(f'{count} {ended}' for ended, count in sorted(counts.items()))}")
    total = sum(counts.total() - counts[NOTHING] for counts in ends.values())
    print(f"{total} injections on {options.server}, {len(failures)} failures: {', '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
