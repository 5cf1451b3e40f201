"""What the jobs of a sweep over ranks share, counted by the tasks that ran; and that sharing changes no bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.artifact import Published
from counterweight.pipeline.jobs.attempt import Exit
from counterweight.pipeline.jobs.batch import get_batch
from counterweight.pipeline.jobs.batch_page import render_batch
from counterweight.pipeline.jobs.drive import Driver, until_idle
from counterweight.pipeline.jobs.pareto import summary
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.requests import submitted
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.manifest import load_submission, parse_manifest
from counterweight.pipeline.memory import PROCESS_BYTES
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import Plan, make_plan
from counterweight.pipeline.pool import Outcome
from counterweight.pipeline.segments import SegmentWriter
from counterweight.workers.errors import RequestError
from counterweight.workers.storage.file import FileStore
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.task import Task
from tests.inprocess import InProcessPool, RecordedProgress, local, run_job, run_manifest
from tests.models import checkpoint, write_text
from tests.pipeline.jobs.theatre import Scripted

RANKS = (2, 4, 6, 8)
LAYERS = 2
RANK = "spec.recipe.compensation.rank.count"

SHARED = ("embed", "keep", "original")
"""The embedding, what is carried over, and what the original makes of the validation's windows."""

SVD = {"weights": {"bits": 4, "group_size": 32}}
LRC = {"transforms": [{"kind": "rotation"}], "weights": {"bits": 4, "group_size": None}, "activations": {"bits": 4}}


def sweep(kind: str, ranks: tuple[int, ...] = RANKS) -> dict[str, dict[str, Any]]:
    """Name -> recipe."""
    recipe = LRC if kind == "lrc" else SVD
    return {f"rank-{rank}": {**recipe, "compensation": {"kind": kind, "rank": {"count": rank}}} for rank in ranks}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "model"
    checkpoint("llama", path, torch.bfloat16, num_hidden_layers=LAYERS)
    return path


def run(
    model: Path,
    root: Path,
    jobs: Mapping[str, Mapping[str, Any]],
    *,
    beside: bool,
    workers: int = 1,
    validation: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Published], list[Counter[str]]]:
    """The jobs one after the other in one output, each with workers of its own: artifacts, and tasks by kind. beside: whether
    each is told of those behind it."""
    published, tasks = {}, []
    names = list(jobs)
    for place, name in enumerate(names):
        pool = InProcessPool(workers)
        others = {other: jobs[other] for other in names[place + 1 :]} if beside else {}
        published[name] = run_job(model, root, jobs[name], name=name, beside=others, pool=pool, validation=validation)
        tasks.append(Counter(kind for _, kind in pool.calls))
    return published, tasks


def tensors(artifact: Path) -> dict[str, bytes]:
    """Those of an artifact, as they are stored."""
    return {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.rglob("*.safetensors")}


def files(published: Mapping[str, Published]) -> dict[str, dict[str, bytes]]:
    """Tensors of each artifact."""
    return {name: tensors(local(one)) for name, one in published.items()}


@dataclass
class InProcess:
    """Attempts that are whole jobs in this process. pools: of each, in order."""

    pools: list[InProcessPool] = field(default_factory=list)

    def start(self, record: JobRecord, beside: Sequence[JobRecord], log: SegmentWriter) -> Scripted:
        log.end()
        self.pools.append(InProcessPool())
        others = [one.manifest for one in beside]
        published = run_manifest(record.manifest, self.pools[-1], RecordedProgress(), others)
        return Scripted(Exit(0, artifact=published.uri))

    @property
    def tasks(self) -> list[Counter[str]]:
        return [Counter(kind for _, kind in pool.calls) for pool in self.pools]


def test_a_batch_over_ranks_is_calibrated_once_and_ends_with_its_pareto_report(model: Path, tmp_path: Path) -> None:
    document = described(model, tmp_path / "batch")
    text = {"uri": write_text(tmp_path / "text.txt", 20_000).as_uri()}
    document["spec"]["calibration"]["source"] = text
    document["spec"]["validation"] = {"text": text, "windows": 2}
    (tmp_path / "job.json").write_text(json.dumps(document))
    spec = {"jobs": ["job.json"], "matrix": {RANK: RANKS}, "concurrency": len(RANKS)}
    batch = {"apiVersion": "counterweight/v1", "kind": "CompressionBatch", "metadata": {"name": "ranks"}, "spec": spec}
    (tmp_path / "batch.json").write_text(json.dumps(batch))

    jobs, attempts = JobStore(FileStore(tmp_path / "store")), InProcess()
    made = submitted(jobs, load_submission(str(tmp_path / "batch.json")))
    driver = Driver(jobs, attempts.start, lambda text: None, pause=lambda seconds: None)
    driver.work(until_idle)

    first, *others = attempts.tasks
    assert (first["forward"], first["block"]) == (LAYERS, LAYERS * len(RANKS))
    for tasks in others:
        assert not any(tasks[kind] for kind in ("forward", "block", *SHARED))
        assert tasks["evaluate"] > 0
    report = summary(get_batch(jobs, made.id))
    assert [point.state for point in report.points] == ["succeeded"] * len(RANKS)
    assert report.points[0].job in report.perplexity_front, "nothing has fewer bits"
    assert len({point.bits for point in report.points}) == len(RANKS)
    page = render_batch(report)
    assert all(point.name in page for point in report.points)
    (same,) = (point.artifact for point in report.points if point.settings[RANK] == 6)
    assert same is not None
    settings = [f"{RANK}=6", f'spec.output.uri="{(tmp_path / "alone").as_uri()}"']
    alone = parse_manifest(json.dumps(document), name="job.json", base=None, overrides=settings).job
    published = run_manifest(alone, InProcessPool(), RecordedProgress())
    assert tensors(Path(same.removeprefix("file://"))) == tensors(local(published))


def test_with_several_workers_it_has_the_bits_of_jobs_that_are_alone(model: Path, tmp_path: Path) -> None:
    jobs = sweep("lrc", (2, 4))
    together, (first, second) = run(model, tmp_path / "together", jobs, beside=True, workers=2)
    assert (first["block"], second["block"], second["forward"]) == (2 * LAYERS, 0, 0)
    alone, (one, other) = run(model, tmp_path / "alone", jobs, beside=False, workers=2)
    assert (one["forward"], other["forward"]) == (first["forward"], first["forward"])
    assert files(together) == files(alone)


def test_what_fails_for_another_job_is_left_to_that_job(model: Path, tmp_path: Path) -> None:
    jobs = sweep("svd", (2, 4))
    pool, progress = Broken(), RecordedProgress()
    run_job(model, tmp_path, jobs["rank-2"], beside={"rank-4": jobs["rank-4"]}, pool=pool, progress=progress)
    assert "block 1 (block), for rank-4: left to that job: no" in progress.notes
    other = InProcessPool()
    run_job(model, tmp_path, jobs["rank-4"], name="rank-4", pool=other)
    assert Counter(kind for _, kind in other.calls)["block"] == 1


def test_who_is_not_compressed_beside_says_why(model: Path, tmp_path: Path) -> None:
    own = sweep("svd", (2,))["rank-2"]
    changes: dict[str, dict[str, Any]] = {
        "its recipe needs other statistics": {"weights": {"bits": 3, "group_size": 32}},
        "spec.recipe.tuning: expected none": {
            "weights": {**SVD["weights"], "quantizer": {"kind": "rtn"}},
            "tuning": {"kind": "lsi"},
        },
        "ranks of a whole model are shared out": {"compensation": {"kind": "svd", "rank": {"budget_bits": 1.0}}},
        "rank.count: 4000: expected at most 64": {"compensation": {"kind": "svd", "rank": {"count": 4000}}},
    }
    beside = {f"job-{place}": {**own, **change} for place, change in enumerate(changes.values())}
    progress, pool = RecordedProgress(), InProcessPool()
    run_job(model, tmp_path, own, beside=beside, pool=pool, progress=progress)
    notes = [note for note in progress.notes if "is not compressed beside this job: " in note]
    assert all(why in note for why, note in zip(changes, notes, strict=True)), notes
    assert Counter(kind for _, kind in pool.calls)["block"] == LAYERS


def test_statistics_that_stay_are_in_the_plan(model: Path, tmp_path: Path) -> None:
    """Of a worker's memory between what a block takes and what it takes when they stay, nothing is shared."""
    plan = planned(model, 1 << 40)
    assert plan.keeps_statistics
    assert all(
        block.peak_bytes <= block.kept_peak_bytes <= block.peak_bytes + block.statistics_bytes for block in plan.blocks
    )
    most = max(block.kept_peak_bytes for block in plan.blocks) + PROCESS_BYTES
    step = 2**20 / 1000  # manifests have thousandths of a MiB
    assert planned(model, most + step).keeps_statistics
    assert not planned(model, most - step).keeps_statistics


def described(model: Path, output: Path) -> dict[str, Any]:
    """A manifest."""
    return {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"uri": model.as_uri()},
            "calibration": {"source": {"uri": model.as_uri()}, "sequences": 8, "sequence_length": 32},
            "recipe": sweep("svd", (2,))["rank-2"],
            "output": {"uri": output.as_uri()},
        },
    }


def planned(model: Path, memory: float) -> Plan:
    """Of a job whose worker has so many bytes."""
    document = described(model, model)
    document["spec"]["resources"] = {"memory_per_worker": f"{memory / 2**20:.3f}MiB"}
    job = parse_manifest(json.dumps(document), name="job.json", base=None).job
    return make_plan(job, open_model(job.spec.model.uri))


class Broken(InProcessPool):
    """What is done for another job's last block fails for good."""

    def submit(self, worker: int, task: Task[object]) -> int:
        if isinstance(task, Compress) and task.beside and task.block_index == LAYERS - 1:
            self._finished.append(Outcome(-1, worker, error=RequestError("no")))
            return -1
        return super().submit(worker, task)
