"""Peak memory of one block's task, measured in a process of its own, beside what `plan` says of it.

    python -m tests.pipeline.peak '{"recipe": {...}, ...}'

prints {"measured": bytes, "planned": bytes} as JSON. The process first does the same with a tiny block, so that what a
library allocates at first use is not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import BlockPlan, block_recipe, make_plan
from counterweight.workers.memory import release
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Blob, Workspace
from tests.models import BASE, CASES, Case, checkpoint, read_config

TINY = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A job of one block. config: of the model, beside `BASE` of `tests.models`. dtype: of the source."""

    name: str
    recipe: Mapping[str, Any]
    case: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    compute: str = "float32"
    sequences: int = 4
    length: int = 512
    propagate: str = "original"
    threads: int = 1

    def tiny(self) -> Measured:
        """The same job, as small as it can be."""
        config = {**self.config, **{name: value for name, value in TINY.items() if name in {*BASE, *self.config}}}
        return Measured(**{**asdict(self), "config": config, "sequences": 2, "length": 32})

    def job(self, source: Path) -> CompressionJob:
        """The manifest, parsed."""
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
                    },
                    "recipe": self.recipe,
                    "resources": {"workers": 1, "cpus_per_worker": self.threads},
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
    paired = measured.propagate == "compressed" and any(part.regresses for part in recipe.values())
    spec = BlockSpec(
        setting=setting,
        index=0,
        tensors={name: source.checkpoint.digest(name) for name in source.block_tensors(0)},
        inputs=_hidden(workspace, measured, source.layout.hidden_size, 0),
        original_inputs=_hidden(workspace, measured, source.layout.hidden_size, 1) if paired else (),
        recipe=recipe,
        propagate=job.spec.calibration.propagate,
    )
    return Prepared(task=Compress(block=spec), plan=make_plan(job, source).blocks[0])


def _hidden(workspace: Workspace, measured: Measured, hidden: int, seed: int) -> tuple[Blob, ...]:
    dtype = getattr(torch, measured.compute)
    generator = torch.Generator().manual_seed(seed)
    shards: list[Blob] = []
    left = measured.sequences
    while left:
        count = min(left, shard_sequences(measured.length))
        shard = torch.randn(count, measured.length, hidden, generator=generator).to(dtype)
        shards.append(workspace.put_tensors({"hidden": shard}, durable=False))
        left -= count
    return tuple(shards)


def resident_bytes() -> int:
    """What the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(measured: Measured, root: Path) -> dict[str, Any]:
    """Growth of the process while it does the task, and the plan's figure for it, in bytes."""
    real = prepared(measured, root / "real")
    worker = Worker("cpu", measured.threads)
    worker.run(prepared(measured.tiny(), root / "tiny").task)
    release(worker.context.device)
    before = resident_bytes()
    record = worker.run(real.task)
    worker.close()
    return {
        "name": measured.name,
        "measured": record.timing.host_peak_bytes - before,
        "planned": real.plan.peak_bytes,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Measured(**json.loads(sys.argv[1])), Path(scratch))))
