"""What a block's task will work on, from headers and the manifest alone, as `footprint` wants it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.pool import threads_per_worker
from counterweight.pipeline.resolve import linears_of
from counterweight.workers.footprint import Group, Load
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.setting import ITEMSIZE, shard_sequences


def groups_of(source: ModelSource, index: int, recipe: Mapping[str, ModuleRecipe]) -> list[Group]:
    """A block's linears by their input, with what applies to each."""
    layout, linears = source.layout, linears_of(source, index)
    return [
        Group(
            linears={name: linears[name] for name in group},
            recipe={name: recipe[name] for name in group if name in recipe},
            share=layout.family.active_share(source.checkpoint.config, layout.experts, group[0]),
        )
        for group in layout.block_linears(index)
    ]


def load_of(job: CompressionJob, source: ModelSource, index: int, groups: Sequence[Group]) -> Load:
    """What a block's task works on, as `footprint` wants it."""
    calibration, resources, layout = job.spec.calibration, job.spec.resources, source.layout
    itemsize = ITEMSIZE[calibration.compute_dtype]
    together = min(calibration.sequences, shard_sequences(calibration.sequence_length))
    shard = together * calibration.sequence_length
    scores = 0
    if layout.family.eager_attention:
        # Scores, and the probabilities that are made of them in float32.
        heads = int(source.checkpoint.config["num_attention_heads"])
        scores = shard * calibration.sequence_length * heads * (itemsize + 4)
    compressed = calibration.propagate == "compressed"
    regresses = any(part.regresses for group in groups for part in group.recipe.values())
    threads = threads_per_worker(
        resources.cpus_per_worker, resources.workers, available=sorted(os.sched_getaffinity(0))
    )
    return Load(
        groups=groups,
        source_bytes=sum(_decoded_bytes(source, name) for name in source.block_tensors(index)),
        parameters=sum(prod(shape) for shape in layout.block_parameters(index).values()),
        compute=itemsize,
        hidden=layout.hidden_size,
        shard=shard,
        shards=-(-calibration.sequences // together),
        length=calibration.sequence_length,
        attention_bytes=scores,
        paired=compressed and regresses,
        compressed=compressed,
        rotation=job.spec.recipe.rotation,
        stretched=resources.workers > 1,
        threads=1 if resources.gpus_per_worker else threads,
        gpu=resources.gpus_per_worker > 0,
    )


def _decoded_bytes(source: ModelSource, name: str) -> int:
    """Of a tensor in memory; a block-scaled weight takes more than stored."""
    entry = source.checkpoint.entry(name)
    return prod(entry.shape) * entry.dtype.itemsize
