"""The time model of `counterweight plan` against blocks that run on this machine: predicted beside measured.

    python benchmarks/time_model.py [CASE ...] [--record]
    python benchmarks/time_model.py --device cuda [CASE ...] [--sequences N] [--record]
    python benchmarks/time_model.py [--device cuda] --rates FILE

Measures the rates of this machine by kind of work, then calibrates and compresses single blocks with the shapes of published
models, behind one of their shards where there are several: on one thread of the CPU at a part of their width, in CPU seconds,
which other people's load changes less than wall seconds; on a GPU whole, in wall seconds. With `--rates` only the rates are
measured and written, for `counterweight plan --device FILE`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine, measured, record, table, versions
from torch import Tensor
from true_shapes import make, narrowed, shapes

from counterweight.pipeline.estimate import block_seconds
from counterweight.pipeline.estimate.costs import BEGINNING, ENDING, STREAMED
from counterweight.pipeline.loads import load_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.rates import TASK, Rates
from counterweight.pipeline.resolve import block_recipe
from counterweight.workers.arithmetic import arithmetic
from counterweight.workers.calibration.statistics import Accumulator
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.context import DTYPES
from counterweight.workers.footprint import footprint
from counterweight.workers.matrix_flops import cholesky, eigh, product
from counterweight.workers.passing import pass_on
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.setting import Device, Setting, shard_sequences
from counterweight.workers.transfer import to_device, to_host
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob

GPTQ = {"weights": {"bits": 4, "group_size": 64, "quantizer": {"kind": "gptq"}}}
LRC = {
    "transforms": [{"kind": "rotation"}],
    "weights": {"bits": 4, "group_size": None, "quantizer": {"kind": "gptq"}},
    "activations": {"bits": 4, "clip": 0.9},
    "compensation": {"kind": "lrc", "rank": {"fraction": 0.1}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A block of `model` (see `shapes.yaml`), every width divided by `narrow`."""

    model: str
    narrow: int = 1
    recipe: Mapping[str, Any]
    sequences: int = 16
    length: int = 512


CPU_CASES = {
    "Llama-3-8B / 4, W4A16 GPTQ": Case(model="Llama-3-8B", narrow=4, recipe=GPTQ),
    "Llama-3-8B / 4, W4A4 LRC": Case(model="Llama-3-8B", narrow=4, recipe=LRC),
    "Mixtral-8x7B / 8, W4A16 GPTQ": Case(model="Mixtral-8x7B", narrow=8, recipe=GPTQ),
    "Mixtral-8x7B / 8, W4A4 LRC": Case(model="Mixtral-8x7B", narrow=8, recipe=LRC),
    "Qwen3-30B-A3B / 4, W4A16 GPTQ": Case(model="Qwen3-30B-A3B", narrow=4, recipe=GPTQ),
}
GPU_CASES = {
    "Mixtral-8x7B, W4A16 GPTQ": Case(model="Mixtral-8x7B", recipe=GPTQ, sequences=512, length=2048),
    "Llama-3-8B, W4A16 GPTQ": Case(model="Llama-3-8B", recipe=GPTQ, sequences=512, length=2048),
    "Llama-3-8B, W4A4 LRC": Case(model="Llama-3-8B", recipe=LRC, sequences=512, length=2048),
    "Mixtral-8x7B, W4A4 LRC": Case(model="Mixtral-8x7B", recipe=LRC, sequences=512, length=2048),
    "Qwen3-30B-A3B, W4A16 GPTQ": Case(model="Qwen3-30B-A3B", recipe=GPTQ, sequences=512, length=2048),
}
ROOM = 64 << 30
"""Bytes of hidden states in memory: of 512 x 2048 tokens of 4096 numbers of 16 bits, what enters a block and what leaves it are
16 GiB."""

TINY = {"tiny": Case(model="Llama-3-8B", narrow=16, recipe=GPTQ, sequences=65, length=128)}


STEPS = 1000
LASTING = 0.2
"""Seconds of a measurement of one rate: an idle H200 runs at a sixth of its clock, and 3 products end before it has risen."""


class Stopwatch:
    """Seconds of a device: of one thread of the CPU as the CPU counts them, of a GPU as they pass."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def mean(self, run: Callable[[], object]) -> float:
        """Of one call, out of so many that they take `LASTING` seconds, behind as many that warm up: a GPU's clock, too."""
        times, before = 0, time.perf_counter()
        while (times := times + 1) < 3 or time.perf_counter() - before < LASTING:
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()
        before = self.now()
        for _ in range(times):
            run()
        return max(self.now() - before, 1e-9) / times


def measured_rates(device: Device, size: int | None = None) -> Rates:
    """Of one thread of this machine, or of its GPU and one thread beside it. size: of the matrices; by default large enough for
    the device to be busy."""
    torch.set_num_threads(1)
    watch, host = Stopwatch(device), Stopwatch("cpu")
    size = size or (1024 if device == "cpu" else 4096)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2 * size, size, generator=generator, device=device)
    wide, half = x.double(), x.bfloat16()
    positive = wide.T @ wide
    buffer, one = torch.empty_like(x), torch.ones(64, device=device)
    data, resting = bytes(32 << 20), torch.ones(16 << 20)
    copy = torch.empty_like(resting)

    def rate(count: float, run: Callable[[], object], watch: Stopwatch = watch) -> float:
        return count / watch.mean(run)

    def grams(rows: Tensor) -> float:
        sums = Accumulator(size, device)
        return rate(2 * size * size * (size + 128), lambda: sums.add_rows(rows))

    products = product(2 * size, size, size).products32
    return Rates(
        source=f"measured: {_named(device)}",
        products16=rate(products, lambda: half @ half[:size]),
        products32=rate(products, lambda: x @ x[:size]),
        grams16=grams(half if device == "cuda" else x),
        grams32=grams(x),
        products64=rate(products, lambda: wide @ wide[:size]),
        factorizations=rate(cholesky(size).total, lambda: torch.linalg.cholesky_ex(positive)),
        decompositions=rate(eigh(size).total, lambda: torch.linalg.eigh(positive)),
        elementwise=rate(x.numel(), lambda: torch.mul(x, x, out=buffer)),
        step=watch.mean(lambda: [one.add_(1.0) for _ in range(STEPS)]) / STEPS,
        hash=rate(len(data), lambda: hashlib.sha256(data).digest(), host),
        copied=rate(resting.nbytes, lambda: copy.copy_(resting), host),
        link=None if device == "cpu" else rate(half.nbytes, lambda: to_device(to_host(half), half.device)) * 2,
        storage=_storage_rate(data),
        start=_start_seconds(device),
        task=TASK,
    )


def _named(device: Device) -> str:
    if device == "cpu":
        return f"{machine()}, one thread, CPU seconds"
    return f"{torch.cuda.get_device_name()}, {machine()}"


def _start_seconds(device: Device) -> float:
    """Of a process of its own until it has a worker that can compute, with torch and transformers imported; on a CPU, CPU
    seconds."""
    opened = f"torch.ones(1, device=Worker({device!r}).context.device)"
    run = f"import torch; from counterweight.workers.worker import Worker; {opened}"
    usage = measured([sys.executable, "-c", run], ROOT, {})
    return usage.wall if device == "cuda" else usage.cpu


def _storage_rate(data: bytes) -> float:
    """Bytes per CPU second of a file that is written and read, of which the machine keeps a copy in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data"

        def both() -> None:
            path.write_bytes(data)
            path.read_bytes()

        return 2 * len(data) / Stopwatch("cpu").mean(both)


PHASES: Mapping[str, tuple[str, ...]] = {
    "load": BEGINNING,
    "forward": STREAMED,
    "solve": ENDING[:-1],
    "write": ENDING[-1:],
}
"""Phase of a task's account -> steps of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """predicted: of each step. peak: bytes, as the plan has it. calibrating, compressing: measured seconds. timing: where they
    went, and the measured peak, as a report has it."""

    predicted: Mapping[str, float]
    peak: int
    calibrating: float
    compressing: float
    timing: Timing

    def tasks(self) -> list[tuple[str, float, float]]:
        """Task, predicted and measured seconds."""
        ending = sum(self.predicted[step] for step in ENDING)
        return [
            ("calibrate", sum(self.predicted.values()) - ending, self.calibrating),
            ("solve and store", ending, self.compressing),
        ]

    def phases(self) -> list[tuple[str, str, float]]:
        """Phase, predicted seconds step by step, and measured ones."""
        return [
            (phase, ", ".join(f"{step} {self.predicted[step]:.2f}" for step in steps), getattr(self.timing, phase))
            for phase, steps in PHASES.items()
        ]


def compared(case: Case, rates: Rates, root: Path, device: Device) -> Compared:
    """A block, calibrated, solved and stored."""
    config = narrowed(shapes()[case.model].with_layers(1), case.narrow)
    job = _job(case, make(config, root / "model", weights=True, device=device), device)
    source = open_model(job.spec.model.uri)
    recipe = block_recipe(source, 0, job.spec.recipe)
    load = load_of(job, source, 0, recipe)
    # As a job on one worker has them: in its memory, and with each block of a job on CPUs in the store too.
    lasting = device == "cpu"
    predicted = block_seconds(load, arithmetic(load), rates, kept=1.0, written=float(lasting))
    setting = Setting(
        source=source.uri,
        config=source.checkpoint.config,
        workspace=(root / "work").as_uri(),
        compute_dtype=job.spec.calibration.compute_dtype,
        device=device,
        rotation=job.spec.recipe.rotation,
        room=ROOM,
    )
    worker, watch = Worker(device, 1), Stopwatch(device)
    inputs = _hidden(worker, setting, case, source.layout.hidden_size, lasting=lasting)
    checkpoint = Checkpoint.open(source.store)
    spec = BlockSpec(
        setting=setting,
        index=0,
        tensors={name: checkpoint.digest(name) for name in source.block_tensors(0)},
        inputs=inputs,
        recipe=recipe,
        propagate="original",
        lasting=lasting,
        experts=job.spec.calibration.experts_among(recipe),
        batch_bytes=load.batch_bytes,
    )
    print("  checkpoint and inputs are made", flush=True)
    if len(inputs) > 1:
        # A job's first block loads libraries, and compiles a GPU's kernels, for all of them.
        first = spec.model_copy(update={"inputs": inputs[:1]})
        worker.run(Calibrate(block=first, shards=1, stop=1))
        worker.run(Compress(block=first))
        print("  a shard has run", flush=True)
    started = watch.now()
    worker.run(Calibrate(block=spec, shards=len(inputs), stop=len(inputs)))
    between = watch.now()
    print(f"  calibrated in {between - started:.2f} s", flush=True)
    record = worker.run(Compress(block=spec))
    ended = watch.now()
    worker.close()
    return Compared(
        predicted={**predicted.steps, **predicted.streamed(predicted.shards)},
        peak=footprint(load).peak,
        calibrating=between - started,
        compressing=ended - between,
        timing=record.timing,
    )


def _job(case: Case, model: Path, device: Device) -> CompressionJob:
    return CompressionJob.model_validate(
        {
            "apiVersion": "counterweight/v1",
            "kind": "CompressionJob",
            "metadata": {"name": "time-model"},
            "spec": {
                "model": {"uri": model.as_uri()},
                "calibration": {
                    "source": {"kind": "standard_library", "part": "calibration"},
                    "sequences": case.sequences,
                    "sequence_length": case.length,
                    "compute_dtype": "float32" if device == "cpu" else "bfloat16",
                },
                "recipe": case.recipe,
                "resources": {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": int(device == "cuda")},
                "output": {"uri": (model.parent / "output").as_uri()},
            },
        }
    )


def _hidden(worker: Worker, setting: Setting, case: Case, width: int, *, lasting: bool) -> tuple[Blob, ...]:
    """Random hidden states that enter the block, shard by shard, as the block before leaves them."""
    generator = torch.Generator(setting.device).manual_seed(0)
    workspace, of_shard = setting.open_workspace(), shard_sequences(case.length)

    def shard(start: int) -> Blob:
        sequences = min(of_shard, case.sequences - start)
        hidden = torch.randn(sequences, case.length, width, generator=generator, device=setting.device)
        hidden = hidden.to(DTYPES[setting.compute_dtype])
        return pass_on(worker.context, workspace, hidden, room=setting.room, lasting=lasting)

    return tuple(shard(start) for start in range(0, case.sequences, of_shard))


def _shown(rates: Rates) -> str:
    """Rates as a table."""
    units = {"step": "s", "start": "s", "task": "s", "hash": "B/s", "link": "B/s", "storage": "B/s"}
    rows = [
        [name, f"{value:.3g} {units.get(name, 'operations/s')}"]
        for name, value in rates.model_dump().items()
        if isinstance(value, float)
    ]
    return table(["rate", "measured"], rows)


def _work_of(cases: Mapping[str, Case], rates: Rates, device: Device) -> str:
    """Two tables: seconds of the tasks, and where they went."""
    tasks: list[list[str]] = []
    phases: list[list[str]] = []
    peaks: list[list[str]] = []
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            found = compared(case, rates, Path(scratch), device)
        for task, predicted, taken in found.tasks():
            tasks.append([name, task, f"{predicted:.2f}", f"{taken:.2f}", f"{predicted / taken:.2f}"])
            print(*tasks[-1], sep="  ", flush=True)
        for phase, steps, taken in found.phases():
            phases.append([name, phase, steps, f"{taken:.2f}"])
            print(" ", *phases[-1], sep="  ", flush=True)
        if device == "cuda":
            own, planned = found.timing.device_peak_bytes / 2**30, found.peak / 2**30
            peaks.append([name, f"{planned:.2f}", f"{own:.2f}", f"{planned / own:.2f}"])
            print(" ", *peaks[-1], sep="  ", flush=True)
    return "\n\n".join(
        [
            table(["block", "task", "predicted, s", "measured, s", "ratio"], tasks),
            "Where the seconds went; measured ones as they pass:",
            table(["block", "phase", "predicted, s", "measured, s"], phases),
            *([table(["block", "planned peak of the GPU, GiB", "measured", "ratio"], peaks)] if peaks else []),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", help=f"of {', '.join([*CPU_CASES, *GPU_CASES, *TINY])}; default: the device's"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sequences", type=int, help="of calibration, in the place of what a case has")
    parser.add_argument("--rates", type=Path, help="only measure rates, and write them to this file")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    device: Device = arguments.device
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rates = measured_rates(device)
    if arguments.rates is not None:
        arguments.rates.write_text(rates.model_dump_json(indent=1))
        print(arguments.rates)
        return
    usual = CPU_CASES if device == "cpu" else GPU_CASES
    every = {**CPU_CASES, **GPU_CASES, **TINY}
    cases = {name: every[name] for name in arguments.cases or usual}
    if arguments.sequences is not None:
        cases = {
            f"{name}, {arguments.sequences} sequences": replace(case, sequences=arguments.sequences)
            for name, case in cases.items()
        }
    body = _work_of(cases, rates, device) + "\n\n" + _shown(rates)
    print(body)
    if arguments.record:
        about = f"{_named(device)}. {versions('torch', 'transformers')}."
        print(
            record(
                "time-model" + ("" if device == "cpu" else "-gpu"), "The time model beside measured blocks", body, about
            )
        )


if __name__ == "__main__":
    main()
