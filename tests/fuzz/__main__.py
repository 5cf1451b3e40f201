"""Fuzzes for a while: `python -m tests.fuzz --minutes 60`. A seed that fails is printed with its target and traceback, and at
the end what the inputs of each target have cost at most, beside harmless ones of the same run."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.fuzz.costs import Cost, metered
from tests.fuzz.targets import Fuzz


def main() -> int:
    """Exit code 1 when an input was not refused as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="the first seed; default: of the clock")
    parser.add_argument("--target", default=None, help="this one only")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    print(f"seeds from {first}", flush=True)
    counts: Counter[str] = Counter()
    costs: dict[str, Cost] = {}
    failures: list[str] = []
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as root:
        fuzz = Fuzz(Path(root))
        names = [options.target] if options.target else list(fuzz.targets)
        normal = {name: fuzz.normal(name) for name in names}
        seed = first
        while time.monotonic() < end:
            for name in names:
                try:
                    with metered() as cost:
                        fuzz.targets[name](random.Random(seed))
                    costs[name] = costs.get(name, Cost()).most(cost)
                    cost.check(normal[name])
                except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
                    failures.append(f"{name} {seed}")
                    print(f"target {name}, seed {seed}\n{traceback.format_exc()}", flush=True)
                counts[name] += 1
            seed += 1
    print(
        "| target | inputs | most CPU of one, s | of a harmless one | most further memory of one, MiB |\n|---|---|---|---|---|"
    )
    for name, cost in costs.items():
        print(f"| {name} | {counts[name]} | {cost.cpu:.2f} | {normal[name].cpu:.2f} | {cost.bytes >> 20} |")
    print(f"{counts.total()} inputs, {len(failures)} failures: {', '.join(failures) or 'none'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
