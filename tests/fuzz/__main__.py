"""Fuzzes for a while: `python -m tests.fuzz --minutes 60`. A seed that fails is printed with its target and traceback."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.targets import Fuzz

MAX_CPU = 5.0
"""Seconds of CPU that one input may cost in this process."""


def main() -> int:
    """Exit code 1 when an input was not refused as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="the first seed; default: of the clock")
    parser.add_argument("--target", default=None, help="this one only")
    options = parser.parse_args()
    first = int(time.time()) if options.seed is None else options.seed
    print(f"seeds from {first}", flush=True)
    counts: dict[str, int] = {}
    failures: list[str] = []
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as root:
        targets = Fuzz(Path(root)).targets
        names = [options.target] if options.target else list(targets)
        seed = first
        while time.monotonic() < end:
            for name in names:
                start = time.process_time()
                try:
                    targets[name](random.Random(seed))
                    spent = time.process_time() - start
                    if spent > MAX_CPU and counts.get(name):  # the first makes the honest inputs too
                        raise TimeoutError(f"{spent:.1f} s of CPU")
                except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
                    failures.append(f"{name} {seed}")
                    print(f"target {name}, seed {seed}\n{traceback.format_exc()}", flush=True)
                counts[name] = counts.get(name, 0) + 1
            seed += 1
    print(f"{sum(counts.values())} inputs ({counts}), {len(failures)} failures: {', '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
