"""How long a job will take, said before its workers start: by its plan, from headers, at rates that nobody has measured yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterweight.pipeline.judging.task_files import read_documents
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.rates import GPUS, UNMEASURED, Rates
from counterweight.pipeline.remaining import START
from counterweight.workers.errors import CounterweightError
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.models.plain import plain_layout

ANY_GPU = "H100-80G"
"""Whose rates are taken where the workers have a GPU: which one it is they say when they have started."""

FORK_SECONDS = 5.0
"""Until a fork of this process answers, libraries loaded."""


class _NotPlainError(CounterweightError):
    """Only transformers knows what the model is, and loading it takes longer than starting workers."""


def expected_stages(job: CompressionJob, root: str, *, forked: bool) -> Mapping[str, float]:
    """Stage -> seconds, in their order; empty where that is not known before workers answer, or where something is wrong, which
    is for those to say who open the job. root: where the model lies; forked: whether workers are forks of this process."""
    try:
        source = open_model(root, _plain)
        documents = read_documents(job.spec.validation, source.store)
        plan = make_plan(job, source, rates=_rates(job), documents=documents)
    except CounterweightError:
        return {}
    if plan.estimate is None or plan.problems:
        return {}
    return {**plan.estimate.stages, **({START: FORK_SECONDS} if forked else {})}


def _rates(job: CompressionJob) -> Rates:
    return GPUS[ANY_GPU] if job.spec.resources.gpus_per_worker > 0 else UNMEASURED


def _plain(config: Mapping[str, Any], stored: frozenset[str]) -> ModelLayout:
    if (layout := plain_layout(config, stored)) is None:
        raise _NotPlainError("config.json: expected that of a usual model")
    return layout
