"""The result of `make serve-test` as a dated file, with the digest of what was tried: `python -m tests.serving.record DIR ...`.
Several folders: where the tests ran in several processes."""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "serving.json"
SOURCES = ("pipeline/serving/**/*.py", "tests/serving/cases.py", "tests/serving/engine.py")


def digest() -> str:
    """sha256 of the sources of what is served, and of what is tried."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def record(folders: Iterable[Path]) -> None:
    """Writes the result file; ValueError where a folder's figures are of other sources."""
    figures: dict[str, dict[str, Any]] = {}
    for folder in folders:
        found = json.loads((folder / "figures.json").read_text())
        if found["sources"] != digest():
            raise ValueError(f"{folder}: figures of other sources: expected make serve-test from the start")
        for name, figure in found["figures"].items():
            figures.setdefault(name, {}).update(figure)
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = {
        "command": "make serve-test",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision.stdout.strip(),
        "vllm": "0.32.0, CPU",
        "sources": digest(),
        "figures": figures,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    record([Path(folder) for folder in sys.argv[1:]])
