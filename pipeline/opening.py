"""Everything of a job that can be refused before its first block is touched: output, model, recipe, memory, texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.event_store import EventStore
from counterweight.pipeline.events import EventLog, JobStarted
from counterweight.pipeline.manifest import CompressionJob, job_id
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.plan import Plan, make_plan
from counterweight.pipeline.policies import STALE, RetryPolicy
from counterweight.pipeline.pool import WorkerPool
from counterweight.pipeline.preflight import Ready, beyond_positions, look
from counterweight.pipeline.processor import emulated
from counterweight.pipeline.tokens import Tokens, read_tokens
from counterweight.workers.calibration.source import ModelSamples
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.errors import RequestError, StorageError
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.storage import ObjectStore
from counterweight.workers.tasks.describe import Describe
from counterweight.workers.tasks.sample import Sample
from counterweight.workers.tasks.setting import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a job runs on: its model, its tokens, and the plan, which is made once. gpu_bytes: memory of a worker's GPU, 0 for
    not known."""

    source: ModelSource
    tokens: Tokens
    plan: Plan
    gpu_bytes: int = 0


def open_job(
    job: CompressionJob,
    pool: WorkerPool,
    log: EventLog,
    *,
    here: bool,
    ready: Ready | None = None,
    device: Callable[[], Device] = lambda: "cpu",
    gpu_bytes: Callable[[], int] = lambda: 0,
) -> Opened:
    """The model, checked against its architecture and the recipe, tokens and plan; the output, checked for what we need of it.

    What the architecture is a worker says: it needs transformers anyway, this process would load it for that alone.
    here: the workers run on this machine, so they must fit into it. ready: what `look` found, where the job has been looked at.
    device: what workers compute on, and gpu_bytes: memory of a worker's GPU, 0 for not known; asked when one has answered.
    Raises RequestError and its kinds, SurroundingsError.
    """
    ready = ready or look(job)
    log.add(EventStore(ready.output, job_id(job), log.note))
    log.emit(JobStarted(job.metadata.name, job_id(job), pool.size))
    _sweep(ready.output, log)
    dispatcher = Dispatcher(pool, RetryPolicy(), log.emit)

    def describe(config: Mapping[str, object], stored: frozenset[str]) -> ModelLayout:
        (layout,) = dispatcher.run_all([Describe(config, stored)])
        return layout

    source = open_model(ready.root, describe)
    if source.checkpoint.asks_for_code:
        model_type = source.layout.model_type
        log.note(f"config.json: auto_map: code of the repository is never run; transformers' own runs {model_type}")
    memory = gpu_bytes()
    plan = make_plan(job, source, gpu_bytes=memory)
    # Of workers elsewhere nothing is known but what the manifest says.
    if plan.problems and (here or job.spec.resources.memory_per_worker is not None):
        raise RequestError("spec.resources: " + "; ".join(plan.problems))
    if (beyond := beyond_positions(job, source.checkpoint.config)) is not None:
        log.note(beyond)
    if here and (slow := emulated(job)) is not None:
        log.note(slow)
    sampled = isinstance(job.spec.calibration.source, ModelSamples)
    drawn = _sampled(job, source, dispatcher, device()) if sampled else None
    tokens = read_tokens(job, None, drawn, ready.texts)
    return Opened(source=source, tokens=tokens.within(source.layout.vocabulary), plan=plan, gpu_bytes=memory)


def _sweep(store: ObjectStore, log: EventLog) -> None:
    """Removes what writers that were killed left behind: temporary files, open multipart uploads. Where that is not possible
    the job goes on."""
    try:
        swept = store.abort_stale_writes(STALE)
    except (RequestError, StorageError) as error:
        log.note(f"unfinished writes of earlier jobs could not be removed: {error}")
        return
    if swept:
        log.note(f"removed {swept} unfinished writes older than {STALE.days} days")


def _sampled(job: CompressionJob, source: ModelSource, dispatcher: Dispatcher, device: Device) -> TokenSet:
    """What the model writes by itself, drawn by one worker."""
    calibration = job.spec.calibration
    assert isinstance(calibration.source, ModelSamples)
    task = Sample(
        source=source.uri,
        compute_dtype=calibration.compute_dtype,
        sequences=calibration.sequences,
        length=calibration.sequence_length,
        temperature=calibration.source.temperature,
        seed=calibration.seed,
        parameters=source.parameters,
        device=device,
    )
    (rows,) = dispatcher.run_all([task])
    return TokenSet.of(rows)
