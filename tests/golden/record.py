"""Records the golden recipes: `python -m tests.golden.record`, after a version was raised or a recipe added.

Digests of this machine, and of machines like it with fewer instructions (`SETTINGS`); on another kind of machine this adds
that machine's. Values are written once for each job and its versions. A change of bits without a change of version is refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden.machine import this_machine
from tests.golden.made import Sources, make
from tests.golden.recipes import RECIPES
from tests.golden.records import Records, Refused

HERE = Path(__file__).parent

SETTINGS = (
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
)
"""Environments under which this processor computes as one without AVX-512, or without its instructions for bfloat16."""


def record_here() -> list[str]:
    """Records what this process computes; returns what was refused, and then writes nothing."""
    records, refused = Records.read(HERE, this_machine()), []
    records.keep_only(RECIPES)
    with tempfile.TemporaryDirectory() as directory:
        sources = Sources(Path(directory))
        for name, golden in RECIPES.items():
            try:
                records.record(name, golden, make(golden, sources, Path(directory) / "jobs" / name))
            except Refused as error:
                refused.append(str(error))
    if not refused:
        records.write()
    return refused


def main() -> int:
    """Exit code 1 when something was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="only under the environment of this process")
    arguments = parser.parse_args()
    refused = record_here()
    print("\n".join(refused) or f"recorded {len(RECIPES)} recipes: {this_machine().name}", flush=True)
    if refused or arguments.here:
        return 1 if refused else 0
    command = [sys.executable, "-m", "tests.golden.record", "--here"]
    return max(subprocess.run(command, env={**os.environ, **setting}, check=False).returncode for setting in SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
