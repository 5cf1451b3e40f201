"""Injects faults by seed: `python -m tests.faults --seeds 0:500`. Each seed is one fault at one moment; the kinds take turns,
those that cost little more often.
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tests.faults.cuts import cut_drills
from tests.faults.drills import Drills
from tests.faults.processes import ProcessDrills
from tests.faults.site import BUCKET, NOTHING, Drill, Site
from tests.faults.warm import warm
from tests.networks import can_make_networks
from tests.servers import ceph_server, moto_server

FAILED = "FAILED"

GROUPS = ("here", "forked", "ray", "cuts")
"""Workers in this process; one that is a fork of the command; two under an embedded Ray; networks that are cut."""


@dataclass(frozen=True, slots=True)
class Injection:
    """ended: as the drill says. seconds: of wall time."""

    seed: int
    kind: str
    ended: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Group:
    """Drills that cost about the same. turns: of each, in a round of all."""

    kinds: dict[str, Drill]
    turns: int


@contextmanager
def made(root: Path, server: str, names: Sequence[str]) -> Iterator[dict[str, Group]]:
    """Name -> group, of these, on a server of this name."""
    ceph = root / "ceph" if server == "ceph" else None
    with ExitStack() as stack:
        running = stack.enter_context(moto_server() if ceph is None else ceph_server(ceph))
        site = Site(root, running.with_bucket(BUCKET))
        processes = ProcessDrills(site, stack.enter_context(warm()))
        groups = {
            "here": Group(Drills(site, ceph).kinds, 6),
            "forked": Group(processes.forked, 6),
            "ray": Group(processes.under_ray, 1),
        }
        if "cuts" in names and can_make_networks():
            groups["cuts"] = Group(stack.enter_context(cut_drills(site)).kinds, 1)
        yield {name: group for name, group in groups.items() if name in names}


def order(groups: Iterable[Group]) -> list[str]:
    """Names of kinds, for the seeds of a round: each as often as it has turns."""
    names = [name for group in groups for name in group.kinds for _ in range(group.turns)]
    Random(len(names)).shuffle(names)
    return names


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
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=GROUPS, help="these only")
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
    with tempfile.TemporaryDirectory(prefix="cw-") as root, made(Path(root), options.server, options.groups) as groups:
        kinds = {name: drill for group in groups.values() for name, drill in group.kinds.items()}
        names = [options.kind] if options.kind else order(groups.values())
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
