"""What workers win by sharing blocks where these come one after the other (`propagate: compressed`), by the plan's time model.

    python benchmarks/sharing.py [MODEL ...] [--device H100-80G] [--record]

Seconds of the blocks of a job: shared; and each at one worker, while the others wait. Jobs and rates are those of `plans.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import record, table, versions
from plans import RECIPES, job_of
from true_shapes import make, shapes

from counterweight.pipeline.estimate import Estimate
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.rates import GPUS

MODELS = ("Mixtral-8x7B", "Llama-3-8B")
WORKERS = (1, 2, 4, 8)

NAMED = 4
"""Steps that a row names."""


def estimated(model: str, source: ModelSource, recipe: Mapping[str, Any], workers: int, device: str) -> Estimate:
    """Of one job."""
    job = job_of(model, source.uri, recipe, workers, "compressed")
    found = make_plan(job, source, device).estimate
    if found is None:
        raise ValueError(f"--device: {device}: expected one of {', '.join(GPUS)}")
    return found


def rows(model: str, source: ModelSource, name: str, device: str) -> list[list[str]]:
    """Of one model and recipe, for each number of workers."""
    found: list[list[str]] = []
    alone = 0.0
    for workers in WORKERS:
        shared = estimated(model, source, RECIPES[name], workers, device)
        with patch("counterweight.pipeline.plan.units", lambda _: ()):
            apart = estimated(model, source, RECIPES[name], workers, device)
        seconds = [one.stages["blocks"] for one in (shared, apart)]
        alone = alone or seconds[0]
        spent = {**shared.steps, "waiting": shared.idle["blocks"]}
        most = sorted(spent.items(), key=lambda item: -item[1])[:NAMED]
        found.append(
            [
                model,
                name,
                str(workers),
                *(f"{one:.0f}" for one in seconds),
                f"{seconds[1] / seconds[0]:.2f}",
                f"{alone / seconds[0]:.2f}",
                ", ".join(f"{step} {spent / workers:.0f}" for step, spent in most),
            ]
        )
        print(*found[-1], sep=" | ", flush=True)
    return found


def body_of(models: Sequence[str], device: str) -> str:
    """The table."""
    found: list[list[str]] = []
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            shape = shapes()[model]
            source = open_model(make(shape.with_layers(shape.config["num_hidden_layers"]), Path(scratch)).as_uri())
            for name in RECIPES:
                found += rows(model, source, name, device)
    header = ["model", "recipe", "workers", "shared, s", "apart, s", "apart / shared", "one / shared"]
    header.append("shared: what a worker does and waits, s of the job")
    return table(header, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=MODELS, help=f"of {', '.join(shapes())}; default: {', '.join(MODELS)}"
    )
    parser.add_argument("--device", default="H100-80G", choices=list(GPUS))
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    body = body_of(arguments.models, arguments.device)
    about = (
        f"{versions('transformers')}. A model, not a measurement: seconds of the blocks of a job with `propagate: compressed`, "
        "on 512 x 2048 tokens. apart: blocks that nobody shares."
    )
    print(body)
    if arguments.record:
        print(record("sharing", f"Blocks that workers share, on {arguments.device}", body, about))


if __name__ == "__main__":
    main()
