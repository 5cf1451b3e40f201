"""What is measured on models as a whole, once an artifact is assembled: tasks of the lm-evaluation-harness, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from counterweight.pipeline.artifact import Artifact, FileEntry
from counterweight.pipeline.artifact.assemble import Parts
from counterweight.pipeline.artifact.report import TaskReport
from counterweight.pipeline.artifact.verdict import GenerationReport
from counterweight.pipeline.graph import giving
from counterweight.pipeline.judging.samples import put_prompts, side_by_side
from counterweight.pipeline.judging.tasks import TaskScores, as_bytes
from counterweight.pipeline.stages import Job
from counterweight.pipeline.tokens import Tokens
from counterweight.workers.harness import Documents
from counterweight.workers.ledger import LEDGER
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, QUANTIZED
from counterweight.workers.tasks.generate import Generate, GenerateRecord
from counterweight.workers.tasks.harness import Harness, HarnessRecord
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.tasks.whole import WholeModel
from counterweight.workers.tensor_blobs import put_tensors

R = TypeVar("R", HarnessRecord, GenerateRecord)


@dataclass(slots=True)
class OnWhole:
    """scores: of tasks. generation: samples, None where none were asked for. tasks: what it cost."""

    scores: TaskScores = field(default_factory=dict)
    generation: GenerationReport | None = None
    tasks: list[TaskReport] = field(default_factory=list)


def measure_on_whole(
    job: Job,
    documents: Documents | None,
    tokens: Tokens,
    artifact: Artifact,
    files: Mapping[str, FileEntry],
    parts: Parts,
) -> OnWhole:
    """Asks every model what the manifest wants to know. documents: the tasks, None without any. files, parts: of the
    artifact."""
    found = OnWhole()
    validation = job.job.spec.validation
    if validation is None or not validation.runs_whole:
        return found
    models = _models(job, artifact, files, parts)
    if documents is not None:
        blob = put_tensors(job.workspace, {"documents": as_bytes(documents)})
        records = _each(job, models, found, lambda model: Harness(**dict(model), documents=blob))
        scores = {variant: record.tasks for variant, record in records.items()}
        found.scores = {**scores, COMPENSATED: scores.get(COMPENSATED, scores[QUANTIZED])}
    if (asked := validation.generation) is not None:
        prompts = put_prompts(job, asked, tokens)
        found.generation = side_by_side(
            asked,
            _each(
                job, models, found, lambda model: Generate(**dict(model), prompts=prompts, new_tokens=asked.new_tokens)
            ),
        )
    return found


def _models(job: Job, artifact: Artifact, files: Mapping[str, FileEntry], parts: Parts) -> dict[str, WholeModel]:
    """Variant -> the model, of those that are not the same as one before."""
    validation = job.job.spec.validation
    assert validation is not None
    compensated = any(module.rank or module.residual_bits for record in parts.blocks for module in record.modules)
    original = WholeModel(
        setting=job.setting.uncompressed(), tensors=job.digests, dtype=validation.compute_dtype, variant=BASELINE
    )
    stored = {"artifact": artifact.uri, "ledger": files[LEDGER].sha256}
    variants = [QUANTIZED, *([COMPENSATED] if compensated else [])]
    return {BASELINE: original} | {
        variant: original.model_copy(update={"variant": variant, **stored}) for variant in variants
    }


def _each(
    job: Job, models: Mapping[str, WholeModel], found: OnWhole, make: Callable[[WholeModel], DurableTask[R]]
) -> dict[str, R]:
    """Variant -> the record of a task on each model; what it cost is added to `found`."""
    nodes = [job.dispatcher.graph.add(giving(make(model))) for model in models.values()]
    records = job.dispatcher.run(nodes, lambda _: None)
    found.tasks += [TaskReport(name=node.made().name, reused=node.reused, timing=node.value.timing) for node in nodes]
    return dict(zip(models, records, strict=True))
