"""CPU seconds of a job with LRC beside those of the same job without a branch: the reference Llama in W4 A4, rotated.

    python benchmarks/lrc_job.py [--manifest JOB] [--sequences 32] [--record]

Whole jobs in this process, on one thread and without validation, one after the other; the least of some repeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, record, table, versions

sys.path.insert(0, str(ROOT))

from counterweight.pipeline.manifest import load_manifest
from tests.inprocess import InProcessPool, RecordedProgress, run_manifest

MANIFEST = ROOT / "manifests" / "reference-llama-w4a4-lrc.yaml"
RECIPES = {"GPTQ": "{kind: none}", "GPTQ, LRC of rank 10 %": "{kind: lrc, rank: {fraction: 0.1}}"}


def seconds(manifest: Path, compensation: str, sequences: int, overrides: list[str]) -> float:
    """Of one job into an empty place."""
    with tempfile.TemporaryDirectory() as output:
        chosen = [
            f"spec.recipe.compensation={compensation}",
            f"spec.calibration.sequences={sequences}",
            f"spec.output.uri={Path(output).as_uri()}",
            *overrides,
        ]
        job = load_manifest(str(manifest), chosen).job
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"validation": None})})
        started = time.process_time()
        run_manifest(job, InProcessPool(), RecordedProgress())
        return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--manifest", type=Path, default=MANIFEST, help="a job with weights and activations in few bits"
    )
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a field of the manifest, as for `run`")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    about = (
        f"{machine()}. {versions('torch', 'transformers')}. {arguments.manifest.stem}, {arguments.sequences} sequences"
    )
    runs: dict[str, list[float]] = {name: [] for name in RECIPES}
    for _ in range(arguments.repeats):
        for name, compensation in RECIPES.items():
            runs[name].append(seconds(arguments.manifest, compensation, arguments.sequences, arguments.set))
    base = min(runs["GPTQ"])
    rows = [[name, f"{min(found):.2f}", f"{min(found) / base:.2f}"] for name, found in runs.items()]
    body = table(["recipe", "tokens to checkpoint, CPU s", "times GPTQ"], rows)
    print(body)
    if arguments.record:
        print(record("lrc-job", "A job with LRC beside one without", body, about))


if __name__ == "__main__":
    main()
