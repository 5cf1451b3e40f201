"""Runs a job on its tokens: inventory, blocks, assembly, validation, publication.

The object store is the only truth. Each stage asks it what is done, hands the rest to workers, and leaves records behind;
the driver can be killed anywhere and started again, and finds its way by the same keys. It never touches a weight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from counterweight.pipeline.allocation import share_out
from counterweight.pipeline.artifact import Artifact, FileEntry, Published
from counterweight.pipeline.assemble import Assembler, Parts, job_recipe, now, publish, repair_pointer, software
from counterweight.pipeline.chain import Chain, Link, Phase, errors_of
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.inventory import inventory
from counterweight.pipeline.manifest import CompressionJob, canonical
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.plan import block_recipe
from counterweight.pipeline.policies import RetryPolicy
from counterweight.pipeline.pool import WorkerPool
from counterweight.pipeline.progress import Progress
from counterweight.pipeline.report import (
    ModelReport,
    Report,
    TaskReport,
    TokensReport,
    bits_per_weight,
    qualities,
)
from counterweight.pipeline.report_html import render
from counterweight.pipeline.tokens import Tokens
from counterweight.pipeline.validate import Windows, check_gates, validate
from counterweight.workers.calibration.source import CalibrationSource
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.errors import GateError
from counterweight.workers.keys import digest, versions
from counterweight.workers.models.layout import EMBEDDING, LM_HEAD, NORM
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.pass_through import PassThrough
from counterweight.workers.tasks.records import LedgerEntry
from counterweight.workers.tasks.setting import Device, Setting
from counterweight.workers.workspace import WORK, Blob, Workspace


@dataclass(slots=True)
class Stopwatch:
    """Wall seconds per stage."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    _stage: str = ""
    _since: float = 0.0

    def stage(self, name: str) -> None:
        """Ends the running stage and begins the next; an empty name only ends."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = name, now
        if name:
            self.progress.stage(name)


class Orchestrator:
    """One job on one pool of workers."""

    def __init__(
        self,
        job: CompressionJob,
        source: ModelSource,
        tokens: Tokens,
        pool: WorkerPool,
        device: Device,
        progress: Progress,
    ) -> None:
        self._job, self._source, self._tokens = job, source, tokens
        self._progress, self._workers = progress, pool.size
        self._store = open_store(job.spec.output.uri)
        self._workspace = Workspace(self._store)
        self._dispatcher = Dispatcher(pool, RetryPolicy(), progress.note)
        self._watch = Stopwatch(progress)
        self._setting = Setting(
            source=source.uri,
            config=source.checkpoint.config,
            workspace=job.spec.output.uri,
            compute_dtype=job.spec.calibration.compute_dtype,
            device=device,
            rotation=job.spec.recipe.rotation,
        )
        self._links: dict[str, Link] = {}

    def run(self) -> Published:
        """To the end. Raises what is final: a wrong request, a failed gate, failing surroundings."""
        tokens = self._tokens
        self._watch.stage("inventory")
        digests = inventory(self._source, self._dispatcher)
        artifact = Artifact(self._store, self._job.metadata.name, self._identity(digests, tokens))
        if (published := artifact.published()) is not None:
            repair_pointer(artifact, published.document)
            blocks = self._source.layout.blocks
            self._progress.note(f"already published: all {blocks} blocks are reused, nothing is left to do")
            self._watch.stage("")
            return published
        self._watch.stage("blocks")
        chain = self._blocks(digests, tokens.calibration)
        self._watch.stage("assemble")
        parts = self._parts(digests, chain.records)
        assembler = Assembler(artifact, self._source, self._workspace, self._dispatcher, parts)
        files = assembler.assemble()
        windows, validations = self._validate(artifact, files, digests, tokens.validation)
        self._watch.stage("publish")
        reports = [*_task_reports(chain), *validations]
        report = self._report(artifact, parts, tokens, digests, windows, reports)
        self._gate(artifact, report)
        published = publish(artifact, report, files, parts.ledger)
        for blob in dict.fromkeys(chain.discardable):
            self._workspace.discard(blob)
        self._watch.stage("")
        return published

    # -- stages, in order ---------------------------------------------------------------------------------------

    def _identity(self, digests: Mapping[str, str], tokens: Tokens) -> str:
        """The artifact's id: of everything that determines its bytes and its figures."""
        validation = tokens.validation
        everything = {
            "job": canonical(self._job).decode(),
            "setting": self._setting.determines(),
            "versions": versions(self._job.spec.recipe),
            "software": software(),
            "tensors": dict(digests),
            "calibration": tokens.calibration.digest,
            "validation": None if validation is None else validation.digest,
        }
        return digest(everything)[:16]

    def _blocks(self, digests: Mapping[str, str], calibration: TokenSet) -> Chain:
        embed = Embed(
            setting=self._setting, tokens=self._store_tokens(calibration), tensor=(EMBEDDING, digests[EMBEDDING])
        )
        (hidden,) = self._dispatcher.run_all([embed])
        propagate = self._job.spec.calibration.propagate
        recipes: list[Mapping[str, ModuleRecipe]] = [
            block_recipe(self._source, index, self._job.spec.recipe) for index in range(self._source.layout.blocks)
        ]
        paired = propagate == "compressed" and any(part.regresses for recipe in recipes for part in recipe.values())

        def spec_of(index: int, inputs: tuple[Blob, ...]) -> BlockSpec:
            return BlockSpec(
                setting=self._setting,
                index=index,
                tensors={name: digests[name] for name in self._source.block_tensors(index)},
                inputs=inputs,
                recipe=recipes[index],
                propagate=propagate,
                paired=paired,
            )

        count = self._source.layout.blocks
        recipes = share_out(self._dispatcher, self._source, recipes, spec_of, hidden.outputs)
        chain = Chain.open(self._workspace, spec_of, hidden.outputs * (2 if paired else 1), count, propagate)
        self._announce(chain)
        while not chain.done:
            self._step(chain)
        return chain

    def _announce(self, chain: Chain) -> None:
        reused = [state.record for state in chain.blocks if state.record is not None]
        self._progress.plan(chain.count, len(reused))
        if reused:
            self._progress.note(f"resuming: {len(reused)} of {chain.count} blocks were finished before and are reused")
        for record in reused:
            self._block_done(record, reused=True)

    def _step(self, chain: Chain) -> None:
        """Gives every idle worker what it can do, then takes in what has finished."""
        for worker in list(self._dispatcher.idle):
            link = chain.assign(worker)
            if link is None:
                continue
            task = link.task
            self._links[task.name] = link
            self._dispatcher.start(worker, task)
            self._progress.block_started(link.spec.index, worker)
        for finished in self._dispatcher.collect():
            link = self._links.pop(finished.task.name)
            if finished.worker_died:
                chain.lost(finished.worker)
            chain.settle(link, finished.worker, finished.value)
            if link.phase is Phase.COMPRESS and finished.value is not None:
                self._block_done(finished.value, reused=False)

    def _block_done(self, record: BlockRecord, *, reused: bool) -> None:
        errors = errors_of(record)
        self._progress.block_done(
            record.index,
            seconds=record.timing.total,
            peak_bytes=record.timing.host_peak_bytes,
            error_quantized=errors["error_quantized"],
            error_compensated=errors["error_compensated"],
            reused=reused,
        )
        if reused:
            return
        for module in record.modules:
            for fallback in module.fallbacks:
                self._progress.note(f"{module.name}: {fallback.step}: {fallback.cause}")

    def _parts(self, digests: Mapping[str, str], records: list[BlockRecord]) -> Parts:
        """What lies outside the blocks: the embedding before them, norm and head behind, and what nobody needs."""
        dropped = dict(self._source.dropped)
        last = [NORM]
        tied, rotation = self._source.layout.tied, self._setting.rotation
        if LM_HEAD in digests and tied:
            dropped[LM_HEAD] = "tied: equal to the embedding, stored once"
        if not tied:
            last.append(LM_HEAD)
        elif rotation is not None and rotation.residual:
            last.append(EMBEDDING)  # rotated with the norm fused into it, it is the embedding no longer
        tasks = [
            PassThrough(setting=self._setting, tensors={name: digests[name] for name in names})
            for names in ([EMBEDDING], last)
        ]
        first, behind = self._dispatcher.run_all(tasks)
        entries = [
            LedgerEntry(
                source=name,
                shape=self._source.checkpoint.entry(name).shape,
                fate="dropped",
                stored_as=(),
                reason=reason,
            )
            for name, reason in dropped.items()
        ]
        return Parts(first, records, behind, entries)

    def _validate(
        self,
        artifact: Artifact,
        files: Mapping[str, FileEntry],
        digests: Mapping[str, str],
        validation: TokenSet | None,
    ) -> tuple[Windows | None, list[TaskReport]]:
        if validation is None:
            return None, []
        self._watch.stage("validate")
        return validate(
            self._dispatcher,
            self._setting,
            digests,
            artifact,
            files,
            self._store_tokens(validation),
            validation.sequences,
            validation.length,
            self._workers,
            self._progress.windows,
        )

    def _report(
        self,
        artifact: Artifact,
        parts: Parts,
        tokens: Tokens,
        digests: Mapping[str, str],
        windows: Windows | None,
        tasks: list[TaskReport],
    ) -> Report:
        spec = self._job.spec
        parameters = self._source.parameters
        baseline, quantized, compensated = (None, None, None) if windows is None else qualities(windows)
        validation = None
        if spec.validation is not None and tokens.validation is not None:
            validation = _tokens_report(spec.validation.text, tokens.validation)
        return Report(
            name=artifact.name,
            id=artifact.id,
            created=now(),
            model=ModelReport(
                uri=spec.model.uri,
                model_type=str(self._source.checkpoint.config["model_type"]),
                parameters=parameters,
                digest=digest(dict(digests)),
            ),
            recipe=job_recipe(self._job),
            calibration=_tokens_report(spec.calibration.source, tokens.calibration),
            validation=validation,
            baseline=baseline,
            quantized=quantized,
            compensated=compensated,
            bits_per_weight=bits_per_weight(parts.blocks, parts.kept_bits, parameters),
            modules=tuple(module for record in parts.blocks for module in record.modules),
            tasks=tuple(tasks),
            stages={"tokens": tokens.seconds, **self._watch.seconds},
            software=software(),
        )

    def _gate(self, artifact: Artifact, report: Report) -> None:
        """Lets a good model pass; of one that fails nothing stays but its report, outside the artifact."""
        validation = self._job.spec.validation
        if validation is None or report.baseline is None or report.compensated is None:
            return
        try:
            check_gates(validation.gates, report.baseline, report.compensated)
        except GateError as error:
            place = f"{WORK}/failed/{artifact.name}-{artifact.id}"
            self._store.write(f"{place}/report.json", report.model_dump_json(indent=1).encode())
            self._store.write(f"{place}/report.html", render(report).encode())
            for info in list(self._store.list(artifact.key(""))):
                self._store.delete(info.key)
            raise GateError(f"{error}\nnothing was published; the report: {self._store.uri_of(place)}") from error

    def _store_tokens(self, tokens: TokenSet) -> Blob:
        return self._workspace.put_tensors({"input_ids": tokens.ids})


def _task_reports(chain: Chain) -> list[TaskReport]:
    return [
        TaskReport(name=f"block {state.record.index}", reused=state.reused, timing=state.record.timing)
        for state in chain.blocks
        if state.record is not None
    ]


def _tokens_report(source: CalibrationSource, tokens: TokenSet) -> TokensReport:
    return TokensReport(
        source=source.model_dump(mode="json"),
        sequences=tokens.sequences,
        sequence_length=tokens.length,
        digest=tokens.digest,
    )
