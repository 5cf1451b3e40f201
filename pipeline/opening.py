"""Everything of a job that can be refused before its first block is touched: output, model, recipe, memory, texts."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.event_store import EventStore
from counterweight.pipeline.events import EventLog, JobStarted
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.model_source import ModelSource, open_model, resolve, tokenizer_of
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.policies import STALE, RetryPolicy
from counterweight.pipeline.pool import WorkerPool
from counterweight.pipeline.tokens import Tokens, read_tokens
from counterweight.workers.calibration.source import ModelSamples
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.errors import RequestError, StorageError
from counterweight.workers.keys import digest
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.storage import ObjectStore, open_store
from counterweight.workers.storage.probe import probe
from counterweight.workers.tasks.describe import Describe
from counterweight.workers.tasks.sample import Sample


def open_job(job: CompressionJob, pool: WorkerPool, log: EventLog, *, here: bool) -> tuple[ModelSource, Tokens]:
    """The model, checked against its architecture and the recipe, and the tokens; the output, checked for what we need of it.

    What the architecture is a worker says: it needs transformers anyway, this process would load it for that alone. While
    the worker does, this process reads the texts.
    here: the workers run on this machine, so they must fit into it. Raises RequestError and its kinds, SurroundingsError.
    """
    try:
        store = open_store(job.spec.output.uri)
        probe(store)
    except RequestError as error:
        raise RequestError(f"spec.output.uri: {error}") from error
    log.add(EventStore(store, job_id(job), log.note))
    log.emit(JobStarted(job.metadata.name, job_id(job), pool.size))
    _sweep(store, log)
    root = resolve(job.spec.model.uri)
    dispatcher = Dispatcher(pool, RetryPolicy(), log.emit)
    sampled = isinstance(job.spec.calibration.source, ModelSamples)
    read: list[Tokens] = []

    def read_texts() -> None:
        if not sampled:
            read.append(read_tokens(job, tokenizer_of(open_store(root))))

    def describe(config: Mapping[str, object], stored: frozenset[str]) -> ModelLayout:
        (layout,) = dispatcher.run_all([Describe(config, stored)], meanwhile=read_texts)
        return layout

    source = open_model(root, describe)
    if source.checkpoint.asks_for_code:
        model_type = source.layout.model_type
        log.note(f"config.json: auto_map: code of the repository is never run; transformers' own runs {model_type}")
    plan = make_plan(job, source)
    # Of workers elsewhere nothing is known but what the manifest says.
    if plan.problems and (here or job.spec.resources.memory_per_worker is not None):
        raise RequestError("spec.resources: " + "; ".join(plan.problems))
    if sampled:
        read.append(read_tokens(job, source.tokenizer(), _sampled(job, source, dispatcher)))
    (tokens,) = read
    return source, tokens.within(source.layout.vocabulary)


def job_id(job: CompressionJob) -> str:
    """Of the manifest, with every default written out: the same job submitted again has the same."""
    return digest([job.metadata.name, job.spec.model_dump(mode="json")])[:16]


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


def _sampled(job: CompressionJob, source: ModelSource, dispatcher: Dispatcher) -> TokenSet:
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
    )
    (rows,) = dispatcher.run_all([task])
    return TokenSet.of(rows)
