"""What `counterweight plan` says of published models on a GPU: seconds, GPU-hours, peaks, traffic, and what is in the way.

    python benchmarks/plans.py [MODEL ...] [--device H100-80G] [--record]

Nothing is measured: the rates are those of `pipeline/rates.py`. Calibrated on 512 x 2048 tokens, validated on 160 windows of
2048, both in bfloat16 as the manifests of GPU jobs have it; read and written at the rate of storage that is told.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import record, table, versions
from true_shapes import make, shapes

from counterweight.pipeline.estimate import Estimate
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.plan import Plan, make_plan
from counterweight.pipeline.rates import GPUS, Rates
from counterweight.pipeline.units import bytes_text, seconds_text

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "W4A16 GPTQ g128": {"weights": {"bits": 4, "group_size": 128, "quantizer": {"kind": "gptq"}}},
    "W4A4 LRC 10 %": {
        "transforms": [{"kind": "rotation"}],
        "weights": {"bits": 4, "group_size": None, "quantizer": {"kind": "gptq"}},
        "activations": {"bits": 4, "clip": 0.9},
        "compensation": {"kind": "lrc", "rank": {"fraction": 0.1}},
    },
}

WORKERS = (1, 8)

TARGETS = {"Llama-3-8B": 3, "Qwen3-30B-A3B": 5, "Mixtral-8x7B": 8, "Llama-3-70B": 25}
"""Minutes of W4A16 on one H100 that the project wants."""

NAMED = 4
"""Steps that a row names."""

WANTED = 0.85
"""Efficiency of several workers that the project wants."""


def job_of(
    model: str, uri: str, recipe: Mapping[str, Any], workers: int, propagate: str = "original"
) -> CompressionJob:
    """The manifest of a row."""
    return CompressionJob.model_validate(
        {
            "apiVersion": "counterweight/v1",
            "kind": "CompressionJob",
            "metadata": {"name": model.lower()},
            "spec": {
                "model": {"uri": uri},
                "calibration": {
                    "source": {"kind": "standard_library", "part": "calibration"},
                    "sequences": 512,
                    "sequence_length": 2048,
                    "compute_dtype": "bfloat16",
                    "propagate": propagate,
                },
                "recipe": recipe,
                "validation": {
                    "text": {"kind": "standard_library", "part": "evaluation"},
                    "windows": 160,
                    "compute_dtype": "bfloat16",
                },
                "resources": {"workers": workers, "gpus_per_worker": 1},
                "output": {"uri": uri},
            },
        }
    )


def row(model: str, plan: Plan, estimate: Estimate) -> list[str]:
    """Of one plan."""
    spent = {**estimate.steps, "waiting": sum(estimate.idle.values())}
    whole = sum(spent.values())
    most = sorted(spent.items(), key=lambda item: -item[1])[:NAMED]
    target = TARGETS.get(model) if estimate.workers == 1 else None
    return [
        model,
        str(estimate.workers),
        seconds_text(estimate.seconds),
        "" if target is None else f"{target} min",
        f"{estimate.gpu_hours:.2f}",
        f"{estimate.efficiency:.0%}" if estimate.workers > 1 else "",
        f"{estimate.efficiency_started:.0%}" if estimate.workers > 1 else "",
        bytes_text(plan.peak_bytes_per_worker) + (" (does not fit)" if plan.problems else ""),
        f"{bytes_text(plan.storage_read_bytes)} / {bytes_text(plan.storage_written_bytes)}",
        ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in most),
        ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in estimate.stages.items()),
    ]


def shortfall(model: str, recipe: str, one: Estimate, several: Estimate) -> list[str]:
    """What lies between several workers and as many times the speed of one, in seconds of the job after the workers' start:
    what they do beyond what one does, and what they wait, over their number, is all of the difference."""
    workers, start = several.workers, several.stages["start"]
    alone, together = one.seconds - start, several.seconds - start
    more = {name: (seconds - one.steps[name]) / workers for name, seconds in several.steps.items()}
    more |= {f"waiting, {stage}": seconds / workers for stage, seconds in several.idle.items() if stage != "start"}
    most = sorted(more.items(), key=lambda item: -item[1])[: NAMED + 1]
    return [
        model,
        recipe,
        f"{alone:.0f}",
        f"{alone / workers:.0f}",
        f"{together:.0f}",
        f"{alone / workers / WANTED:.0f}",
        f"{one.seconds / workers / WANTED - start:.0f}",
        ", ".join(f"{name} {seconds:.1f}" for name, seconds in most),
    ]


def plans_of(model: str, source: ModelSource, recipe: Mapping[str, Any], device: str) -> list[tuple[Plan, Estimate]]:
    """Of one model, for each number of workers."""
    found: list[tuple[Plan, Estimate]] = []
    for workers in WORKERS:
        plan = make_plan(job_of(model, source.uri, recipe, workers), source, device)
        if plan.estimate is None:
            raise ValueError(f"--device: {device}: expected one of {', '.join(GPUS)}")
        found.append((plan, plan.estimate))
        print(*row(model, *found[-1]), sep=" | ", flush=True)
    return found


def described(rates: Rates) -> str:
    """The rates as a table."""
    found = [[name, f"{value:.3g}"] for name, value in rates.model_dump().items() if isinstance(value, float)]
    return table(["rate (per second; step, start, task: seconds)", rates.source], found)


def body_of(models: Sequence[str], device: str) -> str:
    """All tables."""
    parts: dict[str, list[list[str]]] = {name: [] for name in RECIPES}
    lost: list[list[str]] = []
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            shape = shapes()[model]
            source = open_model(make(shape.with_layers(shape.config["num_hidden_layers"]), Path(scratch)).as_uri())
            for name, recipe in RECIPES.items():
                plans = plans_of(model, source, recipe, device)
                parts[name] += [row(model, plan, estimate) for plan, estimate in plans]
                lost.append(shortfall(model, name, plans[0][1], plans[-1][1]))
    header = ["model", "workers", "time", "target", "GPU-hours", "efficiency", "after start-up", "peak of a GPU"]
    header += ["read / written", "workers' time", "stages"]
    tables = [f"## {name}\n\n{table(header, rows)}" for name, rows in parts.items()]
    wanted = f"{WANTED:.0%}"
    header = ["model", "recipe", "one worker, s", "an eighth", "eight workers, s", f"{wanted} would be"]
    header += [f"{wanted} with start-up", "what eight do beyond one, and wait, s of the job"]
    about = "Seconds after the workers have started; where less than an eighth is wanted, no schedule reaches it."
    shortfalls = f"## What is in the way of {wanted}\n\n{about}\n\n{table(header, lost)}"
    return "\n\n".join([*tables, shortfalls, described(GPUS[device])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(shapes())}; default: all")
    parser.add_argument("--device", default="H100-80G", choices=list(GPUS))
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    body = body_of(arguments.models or list(shapes()), arguments.device)
    about = f"{versions('transformers')}. A model, not a measurement: 512 x 2048 tokens, 160 windows."
    print(body)
    if arguments.record:
        print(record("plans", f"Plans of published models' shapes on {arguments.device}", body, about))


if __name__ == "__main__":
    main()
