"""What a block's task will work on, from headers and the manifest alone, as `footprint` and `arithmetic` want it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.pool import threads_per_worker
from counterweight.pipeline.resolve import linears_of
from counterweight.workers.batches import BATCH_BYTES
from counterweight.workers.dtypes import ITEMSIZE
from counterweight.workers.footprint import Group, Load
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.setting import shard_sequences


def load_of(job: CompressionJob, source: ModelSource, index: int, recipe: Mapping[str, ModuleRecipe]) -> Load:
    """What a block's task works on, as `footprint` and `arithmetic` want it."""
    calibration, resources, layout = job.spec.calibration, job.spec.resources, source.layout
    itemsize = ITEMSIZE[calibration.compute_dtype]
    together = shard_sequences(calibration.sequence_length)
    largest = max(calibration.sequences, calibration.drawn, calibration.held_out_sequences)
    scores = 0
    if layout.family.eager_attention:
        # Scores, and the probabilities that are made of them in float32.
        scores = calibration.sequence_length * layout.heads * (itemsize + 4)
    compressed = calibration.propagated == "compressed"
    shared_out = any(part.budget_bits is not None for part in recipe.values())
    regresses = any(part.regresses for part in recipe.values())
    threads = threads_per_worker(
        resources.cpus_per_worker, resources.workers, available=sorted(os.sched_getaffinity(0))
    )
    gpu = resources.gpus_per_worker > 0
    return Load(
        family=layout.family,
        heads=layout.heads,
        groups=tuple(_groups(source, index, recipe)),
        source_bytes=sum(_decoded_bytes(source, name) for name in source.block_tensors(index)),
        parameters=sum(prod(shape) for shape in layout.block_parameters(index).values()),
        compute=itemsize,
        hidden=layout.hidden_size,
        shard=min(largest, together) * calibration.sequence_length,
        shards=-(-calibration.sequences // together),
        length=calibration.sequence_length,
        sequences=calibration.sequences,
        token_scores=scores,
        paired=compressed and regresses,
        compressed=compressed,
        passed=not shared_out and index < (calibration.segment_start(layout.blocks - 1) or 0),
        rotation=job.spec.recipe.rotation,
        stretched=resources.workers > 1,
        threads=1 if gpu else threads,
        gpu=gpu,
        batch_bytes=BATCH_BYTES[gpu],
        experts=calibration.experts_among(recipe),
        drawn=calibration.drawn,
        held_out=calibration.held_out_sequences,
    )


def _groups(source: ModelSource, index: int, recipe: Mapping[str, ModuleRecipe]) -> Iterator[Group]:
    """A block's linears by what they read, with the `recipe` of those that are not kept."""
    layout = source.layout
    linears, shapes = linears_of(source, index), layout.block_parameters(index)
    for group in layout.block_linears(index):
        parts = {name: recipe[name] for name in group if name in recipe}
        asked = bool(parts) and all(part.scales_input for part in parts.values())
        yield Group(
            linears={name: linears[name] for name in group},
            recipe=parts,
            share=layout.active_share(group[0]),
            scaled=asked and layout.family.producer_rows(group, shapes, layout.heads) is not None,
        )


def _decoded_bytes(source: ModelSource, name: str) -> int:
    """Of a tensor in memory; a block-scaled weight takes more than stored."""
    entry = source.checkpoint.entry(name)
    return prod(entry.shape) * entry.dtype.itemsize
