"""Peak memory of one block's task, measured in a process of its own, beside what `plan` says of it.

    python -m tests.pipeline.peak [NAME ...]

prints both for the cases of `peak_cases`. The process first does the same with a tiny block, so that what a library allocates
at first use is not counted; and it returns freed memory from 1 MiB at once, as glibc does by itself from 32 MiB, so that small
models can stand for large ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.memory import PROCESS_BYTES
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import BlockPlan, make_plan
from counterweight.pipeline.resolve import block_recipe
from counterweight.pipeline.shared_blocks import balanced, in_stretches
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.memory import release
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.propagate import Propagate
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.tasks.solve import Solve, SolvedRecord
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob, Workspace
from tests.models import BASE, CASES, Case, checkpoint, read_config

TINY = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A job of one block. config: of the model, beside `BASE` of `tests.models`. dtype: of the source. share: of the memory
    that the block needs at once, which its worker is given; None: all. beside: whether what is calibrated stays in memory.
    workers: that share the block."""

    recipe: Mapping[str, Any]
    case: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    compute: str = "float32"
    sequences: int = 4
    length: int = 512
    propagate: str = "original"
    experts: Mapping[str, Any] = field(default_factory=dict)
    drawn: int = 0
    held_out: int = 0
    threads: int = 1
    share: float | None = None
    beside: bool = False
    workers: int = 1

    def tiny(self) -> Measured:
        """The same job, as small as it can be."""
        config = {**self.config, **{name: value for name, value in TINY.items() if name in {*BASE, *self.config}}}
        return Measured(**{**asdict(self), "config": config, "sequences": 2, "length": 32, "share": None})

    def job(self, source: Path, memory: int | None = None) -> CompressionJob:
        """The manifest, parsed. memory: bytes of a worker for its tasks."""
        given = {} if memory is None else {"memory_per_worker": f"{(PROCESS_BYTES + memory) / 2**20:.3f}MiB"}
        return CompressionJob.model_validate(
            {
                "apiVersion": "counterweight/v1",
                "kind": "CompressionJob",
                "metadata": {"name": "peak"},
                "spec": {
                    "model": {"uri": source.as_uri()},
                    "calibration": {
                        "source": {"kind": "standard_library", "part": "calibration"},
                        "sequences": self.sequences,
                        "sequence_length": self.length,
                        "compute_dtype": self.compute,
                        "propagate": self.propagate,
                        "experts": dict(self.experts),
                        "drawn": self.drawn,
                        "held_out": self.held_out,
                    },
                    "recipe": self.recipe,
                    "resources": {"workers": self.workers, "cpus_per_worker": self.threads, **given},
                    "output": {"uri": source.as_uri()},
                },
            }
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task that can run, and the plan of its block."""

    task: Compress
    plan: BlockPlan


def prepared(measured: Measured, root: Path) -> Prepared:
    """Writes a model and the hidden states that enter its only block."""
    case = CASES[measured.case]
    model = Case(case.family, {**case.config, **measured.config, "num_hidden_layers": 1, "mlp_only_layers": []})
    checkpoint(model, root / "model", getattr(torch, measured.dtype))
    job = measured.job(root / "model")
    source = open_model((root / "model").as_uri())
    plan = make_plan(job, source)
    if measured.share is not None:
        plan = make_plan(measured.job(root / "model", int(measured.share * plan.blocks[0].peak_bytes)), source)
        assert plan.divided, "a share of the memory takes several passes"
        assert not plan.problems
    setting = Setting(
        source=(root / "model").as_uri(),
        config=read_config(root / "model"),
        workspace=root.as_uri(),
        compute_dtype=job.spec.calibration.compute_dtype,
        device="cpu",
        rotation=job.spec.recipe.rotation,
    )
    workspace = setting.open_workspace()
    recipe = block_recipe(source, 0, job.spec.recipe)
    width = source.layout.hidden_size
    inputs, originals = (_hidden(workspace, measured.sequences, measured, width, seed) for seed in (0, 1))
    further, original_further = (_hidden(workspace, measured.held_out, measured, width, seed) for seed in (2, 3))
    drawn, original_drawn = (_hidden(workspace, measured.drawn, measured, width, seed) for seed in (4, 5))
    paired = measured.propagate == "compressed" and any(part.regresses for part in recipe.values())
    spec = BlockSpec(
        setting=setting,
        index=0,
        tensors={name: Checkpoint.open(source.store).digest(name) for name in source.block_tensors(0)},
        inputs=(*inputs, *drawn, *further),
        original_inputs=(*originals, *original_drawn, *original_further) if paired else (),
        recipe=recipe,
        propagate=job.spec.calibration.propagate,
        experts=job.spec.calibration.experts_among(recipe),
        passes=plan.blocks[0].passes,
        drawn_from=len(inputs) if measured.drawn else None,
        held_out_from=len(inputs) + len(drawn) if measured.held_out else None,
    )
    return Prepared(task=Compress(block=spec, beside="another" if measured.beside else ""), plan=plan.blocks[0])


def _hidden(workspace: Workspace, sequences: int, measured: Measured, hidden: int, seed: int) -> tuple[Blob, ...]:
    dtype = getattr(torch, measured.compute)
    generator = torch.Generator().manual_seed(seed)
    shards: list[Blob] = []
    left = sequences
    while left:
        count = min(left, shard_sequences(measured.length))
        shard = torch.randn(count, measured.length, hidden, generator=generator).to(dtype)
        shards.append(put_tensors(workspace, {"hidden": shard}, durable=False))
        left -= count
    return tuple(shards)


def resident_bytes() -> int:
    """What the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes by which a process grows, measured and planned; and the phase in which the plan says so."""

    measured: int
    planned: int
    phase: str


def measure(measured: Measured, root: Path) -> Peak:
    """Growth of this process while it does the task, and the plan's figure for it."""
    real = prepared(measured, root / "real")
    worker = Worker("cpu", measured.threads)
    list(_run(worker, prepared(measured.tiny(), root / "tiny"), measured.workers))
    release(worker.context.device)
    before = resident_bytes()
    most = max(timing.host_peak_bytes for timing in _run(worker, real, measured.workers))
    worker.close()
    grown = most - before
    planned = real.plan.kept_peak_bytes if measured.beside else real.plan.peak_bytes
    return Peak(measured=grown, planned=planned, phase=real.plan.peak_phase)


def _run(worker: Worker, prepared: Prepared, workers: int) -> Iterator[Timing]:
    """Accounts of the block's task; or of those of a worker that does all parts of a block that `workers` share, in turn."""
    task = prepared.task
    if workers == 1:
        yield worker.run(task).timing
        return
    solved: list[SolvedRecord] = []
    parts = balanced(prepared.plan.units, workers)
    assert len(parts) == workers, "each worker has a part"
    for place, linears in enumerate(parts):
        solved.append(worker.run(Solve(block=task.block, linears=linears, part=place, parts=len(parts))))
        yield solved[-1].timing
    if task.block.propagate == "compressed":
        for stretch in in_stretches(len(task.block.inputs), workers):
            propagate = Propagate(block=task.block, solved=tuple(solved), start=stretch.start, stop=stretch.stop)
            yield worker.run(propagate).timing


def _child(measured: Measured, answers: multiprocessing.SimpleQueue[Peak]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        answers.put(measure(measured, Path(scratch)))


def measured_apart(cases: Sequence[Measured]) -> Iterator[Peak]:
    """`measure` of each, in a process of its own. They are forks of one that has imported everything, computed nothing, and has
    the allocator's settings from its beginning."""
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pipeline.peak", json.dumps([asdict(case) for case in cases])]
    with subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            yield Peak(**json.loads(line))
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)


def main(arguments: list[str]) -> None:
    """Measures the jobs that are given as JSON; or cases, all or those named."""
    if arguments and arguments[0].startswith("["):
        fork = multiprocessing.get_context("fork")
        for case in json.loads(arguments[0]):
            answers = fork.SimpleQueue()
            child = fork.Process(target=_child, args=(Measured(**case), answers))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"{case}: exit status {child.exitcode}")
            print(json.dumps(asdict(answers.get())), flush=True)
        return
    from tests.pipeline.peak_cases import CASES, LARGE, SHARED

    print(f"{'case':30} {'phase':10} {'measured':>9} {'planned':>9}  MiB")
    names, known = arguments or list(CASES), {**CASES, **SHARED, **LARGE}
    for name, found in zip(names, measured_apart([known[name][0] for name in names]), strict=True):
        off = found.planned / found.measured - 1
        sizes = f"{found.measured >> 20:9} {found.planned >> 20:9}"
        print(f"{name:30} {found.phase:10} {sizes} {off:+.1%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
