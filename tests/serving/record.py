"""The result of `make serve-test` as a dated file, with the digest of what was tried: `python -m tests.serving.record DIR`."""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "serving.json"
SOURCES = (
    "pipeline/serving/**/*.py",
    "tests/serving/cases.py",
    "tests/serving/engine.py",
    "tests/serving/test_vllm.py",
)


def digest() -> str:
    """sha256 of the sources of what is served, and of what is tried."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def record(found: Mapping[str, Any]) -> None:
    """Writes the result file from figures and the digest of the sources that they are of; ValueError where those changed."""
    if found["sources"] != digest():
        raise ValueError("figures are of other sources: expected make serve-test from the start")
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = {
        "command": "make serve-test",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision.stdout.strip(),
        "vllm": "0.32.0, CPU",
        "sources": digest(),
        "figures": found["figures"],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    record(json.loads((Path(sys.argv[1]) / "figures.json").read_text()))
