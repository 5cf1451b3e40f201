"""Perplexity of reloaded artifacts for the reference models, one row per manifest.

    python benchmarks/quality.py [MANIFEST ...] [--record]

Without arguments: every `manifests/reference-*.yaml` and the demo. Each job runs to its end (or is found finished); the
figures are those that its validation measured on the assembled artifact, read back from storage: the original, the
quantized model without compensation, and the compensated one; with a residual store decoding, and in prefill. Bits per weight
are all in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, machine, record, table, versions


def run(manifest: Path, overrides: list[str]) -> dict[str, Any]:
    """The job's artifact.json."""
    command = [sys.executable, "-m", "counterweight.pipeline.cli", "run", str(manifest), "--json"]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    document: dict[str, Any] = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    return document


def row(name: str, document: dict[str, Any]) -> list[str]:
    """One line of the table."""
    baseline, quantized, compensated = (document[part] for part in ("baseline", "quantized", "compensated"))
    gap = quantized["perplexity"] - baseline["perplexity"]
    closed = (quantized["perplexity"] - compensated["perplexity"]) / gap if gap > 0 else 0.0
    bits = document["bits_per_weight"]
    compensates, prefill = bits["factors"] + bits["residual"] > 0, document["compensated_prefill"]
    return [
        f"`{name}`",
        f"{baseline['perplexity']:.2f}",
        f"{quantized['perplexity']:.2f}",
        f"{compensated['perplexity']:.2f}" if compensates else "",
        "" if prefill is None else f"{prefill['perplexity']:.2f}",
        f"{closed:.0%}" if compensates else "",
        f"{compensated['kl']:.4f}",
        f"{bits['total']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = f"{machine()}. {versions('torch', 'transformers')}."
    shipped = ROOT / "manifests"
    manifests = arguments.manifests or [shipped / "demo.yaml", *sorted(shipped.glob("reference-*.yaml"))]
    rows = []
    for manifest in manifests:
        rows.append(row(manifest.name, run(manifest, arguments.set)))
        print(*rows[-1], flush=True)
    header = ["manifest", "original", "quantized", "compensated", "in prefill", "gap closed", "KL", "bits per weight"]
    body = table(header, rows)
    print(body)
    if arguments.record:
        print(record("quality", "Perplexity of reloaded artifacts", body, about))


if __name__ == "__main__":
    main()
