"""The time model of `counterweight plan` against blocks that run on this machine: predicted beside measured.

    python benchmarks/time_model.py [CASE ...] [--record]
    python benchmarks/time_model.py --rates FILE

Measures the rates of this machine's CPU by kind of work (one thread, CPU seconds, which other people's load changes less than
wall seconds), then calibrates and compresses single blocks with the shapes of published models at a part of their width. With
`--rates` only the rates are measured and written, for `counterweight plan --device FILE`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, record, table, versions
from torch import Tensor
from true_shapes import make, narrowed, shapes

from counterweight.kernels.hadamard import Hadamard
from counterweight.pipeline.estimate import block_seconds
from counterweight.pipeline.loads import load_of
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.rates import START, TASK, Rates
from counterweight.pipeline.resolve import block_recipe
from counterweight.workers.arithmetic import arithmetic
from counterweight.workers.matrix_flops import cholesky, eigh, hadamard64, product
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob, Workspace

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
    narrow: int
    recipe: Mapping[str, Any]
    sequences: int = 16
    length: int = 512


CASES = {
    "Llama-3-8B / 4, W4A16 GPTQ": Case(model="Llama-3-8B", narrow=4, recipe=GPTQ),
    "Llama-3-8B / 4, W4A4 LRC": Case(model="Llama-3-8B", narrow=4, recipe=LRC),
    "Mixtral-8x7B / 8, W4A16 GPTQ": Case(model="Mixtral-8x7B", narrow=8, recipe=GPTQ),
    "Mixtral-8x7B / 8, W4A4 LRC": Case(model="Mixtral-8x7B", narrow=8, recipe=LRC),
    "Qwen3-30B-A3B / 4, W4A16 GPTQ": Case(model="Qwen3-30B-A3B", narrow=4, recipe=GPTQ),
    "tiny": Case(model="Llama-3-8B", narrow=16, recipe=GPTQ, sequences=4, length=128),
}


def measured_rates(size: int = 1024) -> Rates:
    """Of one thread of this machine, in CPU seconds. size: of the matrices."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * size, size, generator=generator)
    wide, half = x.double(), x.bfloat16()
    positive = wide.T @ wide
    buffer, one = torch.empty_like(x), torch.ones(64)
    data = bytes(32 << 20)

    def rate(count: float, run: Callable[[], object]) -> float:
        return count / _cpu_seconds(run)

    def strips() -> None:
        for start in range(0, size, 128):
            torch.mm(x[:, start : start + 128].T, x[:, : start + 128])

    turned = hadamard64(wide.numel(), size)
    products = product(2 * size, size, size).products32
    products32 = rate(products, lambda: x @ x[:size])
    grams = rate(2 * size * size * (size + 128), strips)
    return Rates(
        source=f"measured: {machine()}, one thread, CPU seconds",
        products16=rate(products, lambda: half @ half[:size]),
        products32=products32,
        grams16=grams,
        grams32=grams,
        products64=rate(products, lambda: wide @ wide[:size]),
        factorizations=rate(cholesky(size).total, lambda: torch.linalg.cholesky_ex(positive)),
        decompositions=rate(eigh(size).total, lambda: torch.linalg.eigh(positive)),
        elementwise=rate(x.numel(), lambda: torch.mul(x, x, out=buffer)),
        step=_cpu_seconds(lambda: one.add_(1.0), times=1000),
        host_products64=rate(turned.products64, lambda: Hadamard(size=size).apply(wide)),
        host_elementwise=rate(wide.numel(), lambda: wide * wide),
        hash=rate(len(data), lambda: hashlib.sha256(data).digest()),
        link=None,
        storage=_storage_rate(data),
        start=START,
        task=TASK,
    )


def _storage_rate(data: bytes) -> float:
    """Bytes per CPU second of a file that is written and read, of which the machine keeps a copy in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data"

        def both() -> None:
            path.write_bytes(data)
            path.read_bytes()

        return 2 * len(data) / _cpu_seconds(both)


def _cpu_seconds(run: Callable[[], object], times: int = 3) -> float:
    """The mean of one call, behind one that warms up."""
    run()
    before = time.process_time()
    for _ in range(times):
        run()
    return max(time.process_time() - before, 1e-9) / times


def compared(case: Case, rates: Rates, root: Path) -> list[tuple[str, float, float]]:
    """What, predicted and measured CPU seconds: of calibrating the block, of solving and storing it."""
    config = narrowed(shapes()[case.model].with_layers(1), case.narrow)
    job = _job(case, make(config, root / "model", weights=True))
    source = open_model(job.spec.model.uri)
    recipe = block_recipe(source, 0, job.spec.recipe)
    load = load_of(job, source, 0, recipe)
    predicted = block_seconds(load, arithmetic(load), rates)
    setting = Setting(
        source=source.uri,
        config=source.checkpoint.config,
        workspace=(root / "work").as_uri(),
        compute_dtype=job.spec.calibration.compute_dtype,
        device="cpu",
        rotation=job.spec.recipe.rotation,
    )
    inputs = _hidden(setting.open_workspace(), case, source.layout.hidden_size)
    spec = BlockSpec(
        setting=setting,
        index=0,
        tensors={name: source.checkpoint.digest(name) for name in source.block_tensors(0)},
        inputs=inputs,
        recipe=recipe,
        propagate="original",
    )
    worker = Worker("cpu", 1)
    started = time.process_time()
    worker.run(Calibrate(block=spec, shards=len(inputs), stop=len(inputs)))
    between = time.process_time()
    worker.run(Compress(block=spec))
    ended = time.process_time()
    worker.close()
    calibrating = {**predicted.beginning(), **predicted.streamed(len(inputs))}
    return [
        ("calibrate", sum(calibrating.values()), between - started),
        ("solve and store", sum(predicted.ending().values()), ended - between),
    ]


def _job(case: Case, model: Path) -> CompressionJob:
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
                },
                "recipe": case.recipe,
                "resources": {"workers": 1, "cpus_per_worker": 1},
                "output": {"uri": model.as_uri()},
            },
        }
    )


def _hidden(workspace: Workspace, case: Case, width: int) -> tuple[Blob, ...]:
    """Random hidden states that enter the block, shard by shard."""
    generator = torch.Generator().manual_seed(0)
    every: Tensor = torch.randn(case.sequences, case.length, width, generator=generator)
    return tuple(workspace.put_tensors({"hidden": part}) for part in every.split(shard_sequences(case.length)))


def _shown(rates: Rates) -> str:
    """Rates as a table."""
    units = {"step": "s", "start": "s", "task": "s", "hash": "B/s", "storage": "B/s"}
    rows = [
        [name, f"{value:.3g} {units.get(name, 'operations/s')}"]
        for name, value in rates.model_dump().items()
        if isinstance(value, float)
    ]
    return table(["rate of one thread", "measured"], rows)


def _work_of(names: Sequence[str], rates: Rates) -> list[list[str]]:
    rows: list[list[str]] = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            for what, predicted, measured in compared(CASES[name], rates, Path(scratch)):
                rows.append([name, what, f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}"])
                print(*rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all but tiny")
    parser.add_argument("--rates", type=Path, help="only measure rates, and write them to this file")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    about = f"{machine()}. {versions('torch', 'transformers')}. CPU seconds of one thread."
    rates = measured_rates()
    if arguments.rates is not None:
        arguments.rates.write_text(rates.model_dump_json(indent=1))
        print(arguments.rates)
        return
    names = arguments.cases or [name for name in CASES if name != "tiny"]
    rows = _work_of(names, rates)
    body = table(["block", "task", "predicted, s", "measured, s", "ratio"], rows) + "\n\n" + _shown(rates)
    print(body)
    if arguments.record:
        print(record("time-model", "The time model beside measured blocks", body, about))


if __name__ == "__main__":
    main()
