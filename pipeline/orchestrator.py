"""Runs a job on its tokens: inventory, blocks, assembly, validation, publication.

The object store is the only truth. Each stage asks it what is done, hands the rest to workers, and leaves records behind;
the driver can be killed anywhere and started again, and finds its way by the same keys. It never touches a weight.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean

from counterweight.pipeline.artifact import Artifact, Published
from counterweight.pipeline.artifact.assemble import Assembler, Parts
from counterweight.pipeline.artifact.identity import artifact_id, software
from counterweight.pipeline.artifact.making import Sizes, Timeline
from counterweight.pipeline.artifact.publish import before, publish, repair_pointer
from counterweight.pipeline.artifact.report import (
    DistillationReport,
    ModelReport,
    Report,
    TaskReport,
    bits_per_weight,
    tokens_report,
)
from counterweight.pipeline.artifact.shards import Record
from counterweight.pipeline.beside import add_beside, sharing
from counterweight.pipeline.blocks import Blocks
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.distillation import Trained, add_texts, distill
from counterweight.pipeline.events import ArtifactPublished, EventLog, JobAdmitted
from counterweight.pipeline.graph import Graph, Node
from counterweight.pipeline.inventory import inventory
from counterweight.pipeline.judging.gates import base_model_problem, judge, pass_or_withhold
from counterweight.pipeline.judging.rivals import read_rivals
from counterweight.pipeline.judging.task_files import read_documents
from counterweight.pipeline.judging.tasks import benchmarks, judge_tasks
from counterweight.pipeline.judging.whole import OnWhole, measure_on_whole
from counterweight.pipeline.manifest import TEXT, CompressionJob
from counterweight.pipeline.manifest.job import JobSpec
from counterweight.pipeline.opening import Opened
from counterweight.pipeline.policies import Resume, RetryPolicy
from counterweight.pipeline.pool import WorkerPool
from counterweight.pipeline.resume import outlines, setting_of
from counterweight.pipeline.sizes import source_bytes
from counterweight.pipeline.stages import (
    Job,
    Stopwatch,
    add_embedding,
    add_model,
    add_outside,
    add_references,
    compress_blocks,
    gather_parts,
    measure,
)
from counterweight.pipeline.units import bytes_text
from counterweight.pipeline.validate import Windows, described
from counterweight.workers.errors import RequestError
from counterweight.workers.keys import digest
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.setting import Device
from counterweight.workers.workspace import Workspace


class Orchestrator:
    """One job on one pool of workers. beside: jobs whose blocks are compressed too where they need the same statistics."""

    def __init__(
        self,
        job: CompressionJob,
        opened: Opened,
        pool: WorkerPool,
        device: Device,
        log: EventLog,
        resume: Resume = Resume.AUTO,
        beside: Sequence[CompressionJob] = (),
    ) -> None:
        self._job, self._log, self._resume = job, log, resume
        self._beside, self._gpu_bytes = () if resume is Resume.NEVER else beside, opened.gpu_bytes
        self._source, self._tokens, self._plan = opened.source, opened.tokens, opened.plan
        self._store = open_store(job.spec.output.uri)
        alone = resume is Resume.NEVER
        self._workspace = Workspace(self._store, trusting=not alone)
        self._threads = pool.threads
        self._dispatcher = Dispatcher(pool, RetryPolicy(), log.emit, Graph(self._workspace))
        self._watch = Stopwatch(log)
        self._timeline, self._workers = Timeline(), pool.size
        log.add(self._timeline)
        self._documents = read_documents(job.spec.validation, opened.source.store)
        planned = opened.plan.hidden_states.memory_bytes
        room = planned if pool.room is None else min(planned, pool.room)
        if room < planned:
            log.note(
                f"hidden states: {bytes_text(room)} of memory for each worker: {bytes_text(planned)} would be used"
            )
        self._setting = setting_of(job, self._source, device, run=uuid.uuid4().hex if alone else "", room=room)

    def run(self) -> Published:
        """To the end. Raises what is final: a wrong request, a failed gate, failing surroundings."""
        published = self._run()
        self._watch.stage("")
        self._log.emit(ArtifactPublished(published.uri, published.existing))
        return published

    def _run(self) -> Published:
        tokens = self._tokens
        self._watch.stage("inventory")
        digests = inventory(self._source, self._dispatcher)
        id = artifact_id(self._job, self._source, self._setting.device, digests, tokens, self._documents)
        artifact = Artifact(self._store, self._job.metadata.name, id)
        self._log.emit(JobAdmitted(artifact.id))
        if (published := artifact.published()) is not None:
            if self._resume is Resume.NEVER:
                raise RequestError(
                    f"--resume never: {published.uri} is published already, and what is made anew would be written over "
                    "it: expected another spec.output.uri or metadata.name"
                )
            repair_pointer(artifact, published.document)
            blocks = self._source.layout.blocks
            self._log.note(f"already published: all {blocks} blocks are reused, nothing is left to do")
            return published
        rivals = read_rivals(self._job.spec.validation, tokens.validation)
        job = Job(
            job=self._job,
            source=self._source,
            plan=self._plan,
            setting=self._setting,
            workspace=self._workspace,
            dispatcher=self._dispatcher,
            log=self._log,
            digests=digests,
            threads=self._threads,
            resume=self._resume,
        )
        self._watch.stage("blocks")
        unseen = 0 if tokens.unseen is None else tokens.unseen.sequences
        calibration = tokens.calibration.digest
        outlined = outlines(self._job, self._source, self._plan, self._setting, digests, calibration, unseen)
        # Statistics that other jobs' blocks are solved with too are gathered by one worker.
        model = add_model(job, add_embedding(job, tokens), tokens, outlined, shared=not self._beside)
        if self._beside:
            add_beside(job, model, sharing(job, self._beside, outlined, self._gpu_bytes))
        outside = add_outside(job)
        texts = add_texts(job, tokens)
        references = add_references(job, tokens)
        assembler = Assembler(artifact, self._source, self._workspace, self._dispatcher)
        if texts is None:
            recipes = [block.recipe for block in outlined]
            made: Sequence[Node[Record]] = [outside.first, *model.compress, *outside.behind]
            assembler.begin(made, model.compress, recipes, self._job.spec.calibration.propagated)
        validated = sum(text.ids.numel() for text in tokens.validation.values())
        compress_blocks(job, model, outlined, validated)
        parts = gather_parts(job, model, outside)
        trained: Trained | None = None
        if texts is not None:
            self._watch.stage("distill")
            trained = distill(job, texts, model, outside, parts)
            parts = trained.parts
        self._watch.stage("assemble")
        files = assembler.assemble(parts)
        windows: Windows | None = None
        validations: list[TaskReport] = []
        if references:
            self._watch.stage("validate")
            windows, validations = measure(job, references, artifact, files)
        if self._job.spec.validation is not None and self._job.spec.validation.runs_whole:
            self._watch.stage("whole models")
        whole = measure_on_whole(job, self._documents, tokens, artifact, files, parts)
        validations += whole.tasks
        self._watch.stage("publish")
        tasks = [*_task_reports(model), *(() if trained is None else trained.tasks), *validations]
        report = self._report(artifact, parts, digests, windows, tasks, None if trained is None else trained.report)
        report = self._judged(report, rivals, whole)
        written = sum(entry.size for entry in files.values())
        report = report.model_copy(
            update={
                "sizes": Sizes(source=source_bytes(self._source), artifact=written),
                "making": self._timeline.making(self._workers),
                "earlier": before(artifact),
            }
        )
        pass_or_withhold(artifact, report)
        published = publish(artifact, report, files, parts.ledger())
        leftovers = () if trained is None else trained.discardable
        self._workspace.discard(*dict.fromkeys([*model.discardable, *leftovers]))
        return published

    def _report(
        self,
        artifact: Artifact,
        parts: Parts,
        digests: Mapping[str, str],
        windows: Windows | None,
        tasks: list[TaskReport],
        distillation: DistillationReport | None,
    ) -> Report:
        spec, tokens = self._job.spec, self._tokens
        parameters = self._source.parameters
        measured = windows or Windows()
        texts = measured.by_text(described(spec.validation, tokens)) if measured.metrics else {}
        first = texts.pop(TEXT, None)
        return Report(
            name=artifact.name,
            id=artifact.id,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=ModelReport(
                uri=spec.model.uri,
                model_type=str(self._source.checkpoint.config["model_type"]),
                parameters=parameters,
                digest=digest(dict(digests)),
            ),
            recipe=_recipe(spec),
            calibration=tokens_report(
                spec.calibration.source,
                tokens.calibration,
                tokens.unseen,
                spec.calibration.special_tokens or tokens.usual,
                tokens.drawn,
            ),
            validation=None if first is None else first.tokens,
            validation_dtype="float32" if spec.validation is None else spec.validation.compute_dtype,
            distillation=distillation,
            baseline=None if first is None else first.baseline,
            quantized=None if first is None else first.quantized,
            compensated=None if first is None else first.compensated,
            compensated_prefill=None if first is None else first.compensated_prefill,
            kl_by_position={} if first is None else first.kl_by_position,
            windows={} if first is None else first.windows,
            texts=texts,
            routers={
                variant: {block: mean(shares) for block, shares in blocks.items()}
                for variant, blocks in measured.routers.items()
            },
            bits_per_weight=bits_per_weight(parts.blocks, parts.kept_bits, parameters),
            modules=tuple(module for record in parts.blocks for module in record.modules),
            tasks=tuple(tasks),
            stages={"tokens": tokens.seconds, **self._watch.seconds},
            software=software(),
        )

    def _judged(self, report: Report, rivals: Mapping[str, Report], whole: OnWhole) -> Report:
        """The report with every bound of the manifest in it, and what is wrong with the original itself."""
        validation = self._job.spec.validation
        if validation is None:
            return report
        problem = base_model_problem(report.judged, self._source.layout.vocabulary)
        if problem is not None:
            self._log.note(problem)
        report = report.model_copy(update={"benchmarks": benchmarks(whole.scores), "generation": whole.generation})
        gates = (
            *judge(validation, report.judged, rivals, report.generation),
            *judge_tasks(validation.tasks, whole.scores),
        )
        return report.model_copy(update={"gates": gates, "base_model_problem": problem})


def _recipe(spec: JobSpec) -> dict[str, object]:
    """What was asked, for the report; the distillation only where there is one."""
    asked = {"recipe", "calibration"} | (set() if spec.distillation is None else {"distillation"})
    return spec.model_dump(mode="json", include=asked)


def _task_reports(model: Blocks) -> list[TaskReport]:
    return [
        TaskReport(name=f"block {node.value.index}", reused=node.reused, timing=node.value.timing)
        for node in model.compress
    ]
