"""Blocks on shards of noise, and what their tasks make of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.models.family import is_expert
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.worker import Worker
from tests.models import checkpoint
from tests.workers.specs import RECIPE, Site

GPTQ = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}}}
LRC = {**GPTQ, "activations": {"bits": 4}, "compensation": {"kind": "lrc", "rank": {"count": 4}}, "residual": {}}
SMOOTHED = {**GPTQ, "transforms": [{"kind": "smoothing"}], "activations": {"bits": 8}}
TUNED = {**RECIPE, "tuning": {"kind": "lsi", "epochs": 1, "transforms": True, "batch": 2}}
Propagate = Literal["original", "compressed"]


def site_of(case: str, root: Path) -> Site:
    checkpoint(case, root / "model", torch.bfloat16)
    return Site(source=root / "model", work=root / "work")


def spec_of(
    site: Site,
    recipe: Mapping[str, Any],
    propagate: Propagate = "original",
    experts: ExpertCalibration | None = None,
) -> BlockSpec:
    """A block on three shards of noise."""
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(2, 24, site.builder.hidden_size, generator=generator) for _ in range(3)]
    inputs = tuple(put_tensors(site.workspace, {"hidden": shard}, durable=False) for shard in shards)
    return site.block(0, inputs, recipe, propagate, experts)


def in_passes(spec: BlockSpec, site: Site, together: int) -> BlockSpec:
    """With so many experts, or inputs of other linears, to a pass."""
    groups = site.builder.layout.block_linears(spec.index)
    keys = groupby(groups, key=lambda group: group[0].rpartition(".")[0] if is_expert(group[0]) else group[0])
    units = [[name for group in own for name in group] for _, own in keys]
    starts = range(0, len(units), together)
    passes = tuple(tuple(name for unit in units[start : start + together] for name in unit) for start in starts)
    return spec.model_copy(update={"passes": passes})


def run(task: Any, threads: int = 1) -> Any:
    """On a worker of its own; what is in the workspace is done again."""
    worker = Worker("cpu", threads)
    try:
        return task.compute(worker.context, task.workspace())
    finally:
        worker.close()


def content(record: BlockRecord) -> dict[str, Any]:
    """Everything in a record that is not a time or a peak of memory."""
    return record.model_dump(exclude={"timing": True, "modules": {"__all__": {"seconds"}}})
