"""Jobs of a sweep from one calibration: whoever runs compresses the blocks of the others too, while their statistics are there.

    calibrate k ──> compress k for job B ──> compress k for job C ──> compress k, which uses the statistics up

What is made for another job lies under the keys under which that job looks it up, so each of them stays a job of its own: its
run finds its blocks finished, assembles, validates and publishes them. Its artifact has the bytes of a job that was alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from counterweight.pipeline.allocation import budgeted
from counterweight.pipeline.blocks import Blocks
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.resume import outlines, setting_of
from counterweight.pipeline.stages import Job
from counterweight.workers.errors import ManifestError
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.compress import Compress

Others = Mapping[str, Sequence[BlockSpec]]
"""Name of a job -> its blocks, without what enters them."""


def sharing(job: Job, others: Sequence[CompressionJob], outlined: Sequence[BlockSpec], gpu_bytes: int) -> Others:
    """Those of `others` whose blocks can be solved with the statistics of this job's; of each of the rest a note says why not.
    outlined: this job's blocks; gpu_bytes: memory of a worker's GPU, 0 for not known."""
    found: dict[str, Sequence[BlockSpec]] = {}
    for other in others:
        name = other.metadata.name
        try:
            specs, why = _outlined(job, other, outlined, gpu_bytes)
        except ManifestError as error:
            specs, why = [], str(error).splitlines()[0]
        if why:
            job.log.note(f"{name} is not compressed beside this job: {why}")
        else:
            found[name] = specs
    if found:
        job.log.note(f"compressed beside this job, from one calibration: {', '.join(found)}")
    return found


def _outlined(
    job: Job, other: CompressionJob, own: Sequence[BlockSpec], gpu_bytes: int
) -> tuple[Sequence[BlockSpec], str]:
    """Another job's blocks, and why they cannot be made here; empty when they can. ManifestError for what the model cannot
    give."""
    for part in ("model", "calibration", "output"):
        if getattr(other.spec, part) != getattr(job.job.spec, part):
            return [], f"spec.{part} is not the same"
    plan = make_plan(other, job.source, gpu_bytes=gpu_bytes)
    if not (plan.keeps_statistics and job.plan.keeps_statistics):
        return [], "a worker's memory does not hold statistics while blocks are solved with them"
    setting = setting_of(other, job.source, job.setting.device)
    unseen = None if own[0].held_out_from is not None else 0
    specs = outlines(other, job.source, plan, setting, job.digests, own[0].tokens, unseen)
    recipes = [spec.recipe for spec in (*own, *specs)]
    if own[0].propagate != "original":
        return [], "spec.calibration.propagate: expected original"
    if budgeted(recipes):
        return [], "ranks of a whole model are shared out"
    if any(part.tuning is not None for recipe in recipes for part in recipe.values()):
        return [], "spec.recipe.tuning: expected none"
    if [spec.statistics_key() for spec in specs] != [spec.statistics_key() for spec in own]:
        return [], "its recipe needs other statistics"
    return specs, ""


def add_beside(job: Job, blocks: Blocks, others: Others) -> None:
    """Nodes for the blocks of other jobs, before those of this job's own that use the statistics up."""

    def compress(index: int, name: str) -> Compress:
        inputs = blocks.spec(index).inputs
        return Compress(block=others[name][index].model_copy(update={"inputs": inputs}), beside=name)

    for index, own in enumerate(blocks.compress):
        for name in others:
            job.dispatcher.graph.add(
                partial(compress, index, name), uses=own.uses, rereads=own.rereads, after=own.after, before=own
            )
