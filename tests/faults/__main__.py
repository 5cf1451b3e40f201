"""Injects faults by seed: `python -m tests.faults --seeds 0:500`. Each seed is one fault at one moment; the kinds take turns.
How each job ended is printed, with a traceback where that is not as it should be; the counts come last.

    python -m tests.faults --seeds 0:500 --minutes 60 --record faults.jsonl

takes several runs for what is too long for one: seeds that are recorded are not done again, and are counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tests.faults.drills import Drills
from tests.faults.processes import ProcessDrills
from tests.faults.site import BUCKET, NOTHING, Drill, Site
from tests.servers import ceph_server, moto_server

FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Injection:
    """ended: as the drill says. seconds: of wall time."""

    seed: int
    kind: str
    ended: str
    seconds: float


@contextmanager
def made(root: Path, server: str) -> Iterator[tuple[dict[str, Drill], dict[str, Drill]]]:
    """Name -> drill, on a server of this name: those whose workers are in this process, and those of processes."""
    ceph = root / "ceph" if server == "ceph" else None
    with moto_server() if ceph is None else ceph_server(ceph) as running:
        site = Site(root, running.with_bucket(BUCKET))
        yield Drills(site, ceph).kinds, ProcessDrills(site).kinds


def injected(kind: str, drill: Drill, seed: int) -> Injection:
    """Does it, and says so."""
    began = time.monotonic()
    try:
        ended = drill(Random(seed))
    except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
        ended = FAILED
        print(f"kind {kind}, seed {seed}\n{traceback.format_exc()}", flush=True)
    print(f"{seed} {kind}: {ended}", flush=True)
    return Injection(seed, kind, ended, round(time.monotonic() - began, 1))


def counts(injections: Sequence[Injection]) -> str:
    """A Markdown table of how jobs ended, by kind, and a line on all of them."""
    ends = sorted({one.ended for one in injections})
    lines = ["| kind | " + " | ".join(ends) + " |", "|---|" + "---|" * len(ends)]
    for kind in dict.fromkeys(one.kind for one in injections):
        found = Counter(one.ended for one in injections if one.kind == kind)
        lines.append(f"| {kind} | " + " | ".join(str(found[end] or "") for end in ends) + " |")
    failures = [f"{one.kind} {one.seed}" for one in injections if one.ended == FAILED]
    total = sum(one.ended != NOTHING for one in injections)
    hours = sum(one.seconds for one in injections) / 3600
    lines += ["", f"{total} injections in {hours:.1f} h, {len(failures)} failures: {', '.join(failures) or 'none'}"]
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 when something was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:500", help="from:to, without the last")
    parser.add_argument("--kind", default=None, help="this one only")
    parser.add_argument("--without-processes", action="store_true", help="only drills with workers in this process")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further one then")
    parser.add_argument(
        "--record", type=Path, default=None, help="a file that keeps what was done, and is gone on with"
    )
    default = "moto" if shutil.which("radosgw") is None else "ceph"
    parser.add_argument("--server", choices=("moto", "ceph"), default=default)
    options = parser.parse_args()
    first, last = map(int, options.seeds.split(":"))
    found: list[Injection] = []
    if options.record is not None and options.record.exists():
        found = [Injection(**json.loads(line)) for line in options.record.read_text().splitlines()]
    done = {one.seed for one in found}
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="cw-") as root, made(Path(root), options.server) as (local, processes):
        kinds = local if options.without_processes else local | processes
        names = [options.kind] if options.kind else list(kinds)
        for seed in range(first, last):
            if time.monotonic() > end:
                break
            if seed in done:
                continue
            name = names[seed % len(names)]
            found.append(injected(name, kinds[name], seed))
            if options.record is not None:
                with options.record.open("a") as file:
                    file.write(json.dumps(asdict(found[-1])) + "\n")
    print(f"{counts(found)}, on {options.server}")
    return int(any(one.ended == FAILED for one in found))


if __name__ == "__main__":
    sys.exit(main())
