"""Jobs whose compressed model is trained as a whole: what is published, what is refused, and that it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from counterweight.pipeline.artifact import Published
from counterweight.pipeline.artifact.load import load_model
from counterweight.pipeline.artifact.report import DistillationReport
from counterweight.pipeline.manifest import canonical, parse_manifest
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.tokens import read_tokens
from counterweight.workers.context import TaskContext
from counterweight.workers.distilled import EPOCH, read_student
from counterweight.workers.errors import ManifestError, RequestError
from counterweight.workers.tasks.distill import Distill, DistillRecord
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.task import Task
from counterweight.workers.workspace import COMMITS, AnyRecord, Workspace
from tests.inprocess import InProcessPool, RecordedProgress, local, run_job
from tests.models import checkpoint, write_text

RECIPE: Mapping[str, Any] = {
    "transforms": [{"kind": "rotation"}],
    "weights": {"bits": 3, "quantizer": {"kind": "rtn"}},
    "activations": {"bits": 6},
    "compensation": {"kind": "svd", "rank": {"count": 2}, "whitening": "none"},
}
TRAINING: Mapping[str, Any] = {"epochs": 2, "factor_rate": 1e-3, "scale_rate": 1e-3, "average": 0.9}
RUINOUS: Mapping[str, Any] = {**TRAINING, "factor_rate": 10.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    checkpoint("llama", directory)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A distillation's texts: windows of one, held out the next of it and some of another."""
    directory = tmp_path_factory.mktemp("texts")
    first, second = ({"uri": write_text(directory / f"{seed}.txt", 8000, seed=seed).as_uri()} for seed in (1, 2))
    return {
        "texts": [{"source": first, "sequences": 96}],
        "held_out": [{"source": first, "sequences": 8, "skip": 96}, {"source": second, "sequences": 8}],
    }


class Watching(InProcessPool):
    """Keeps the tasks that it ran."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(workers)
        self.tasks: list[Task[object]] = []

    def submit(self, worker: int, task: Task[object]) -> int:
        self.tasks.append(task)
        return super().submit(worker, task)


def tensors_of(published: Published) -> dict[str, Tensor]:
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(local(published).rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def report_of(published: Published) -> DistillationReport:
    document = json.loads((local(published) / "report" / "report.json").read_text())
    return DistillationReport.model_validate(document["distillation"])


def document_of(model: Path, texts: Mapping[str, Any], recipe: Mapping[str, Any] = RECIPE, **training: Any) -> str:
    source = texts["texts"][0]["source"]
    spec = {
        "model": {"uri": model.as_uri()},
        "calibration": {"source": source, "sequences": 8, "sequence_length": 32},
        "recipe": dict(recipe),
        "distillation": {**texts, "training": training},
        "output": {"uri": (model / "out").as_uri()},
    }
    return json.dumps(
        {"apiVersion": "counterweight/v1", "kind": "CompressionJob", "metadata": {"name": "tiny"}, "spec": spec}
    )


def divergence_of(published: Published, model: Path, ids: Tensor) -> float:
    """KL(original || published) in the mean over tokens [sequences, length], of stock transformers and our public loader."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    served = load_model(published.uri, dtype=torch.float32)
    with torch.no_grad():
        meant = torch.distributions.Categorical(logits=original(ids).logits)
        own = torch.distributions.Categorical(logits=served(ids).logits)
    return float(torch.distributions.kl_divergence(meant, own).mean())


def test_what_is_published_diverges_as_the_report_says(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    progress = RecordedProgress()
    published = run_job(
        model, tmp_path, RECIPE, distillation={**texts, "training": TRAINING}, validation={}, progress=progress
    )
    report = report_of(published)
    assert report.kept > 0
    start, best = report.divergences[0], report.divergences[report.kept]
    assert all(after < before for before, after in zip(start, best, strict=True))
    assert [text.sequences for text in report.held_out] == [8, 8]
    assert progress.stages == ["inventory", "blocks", "distill", "assemble", "validate", "publish"]
    assert any(note.startswith(f"distillation: epoch {report.kept} of 2 is kept") for note in progress.notes)

    job = parse_manifest(document_of(model, texts), name="tiny.json", base=None).job
    tokens = read_tokens(job, (model / "tokenizer.json").read_bytes())
    found = [divergence_of(published, model, text.ids.long()) for text in tokens.held_out]
    assert found == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "gemma2", "llama-tied-biased", "qwen3"])
def test_every_kind_of_model_is_served_as_it_was_trained(case: str, texts: dict[str, Any], tmp_path: Path) -> None:
    """With int8 factors, in its own coordinates, and tied where the model is."""
    checkpoint(case, tmp_path / "model")
    compensation = {"kind": "lrc", "rank": {"count": 2}, "factor_bits": 8}
    recipe = {**RECIPE, "transforms": [], "compensation": compensation}
    distillation = {**texts, "training": {**TRAINING, "epochs": 1}}
    published = run_job(tmp_path / "model", tmp_path / "out", recipe, distillation=distillation)
    report = report_of(published)
    job = parse_manifest(document_of(tmp_path / "model", texts), name="tiny.json", base=None).job
    tokens = read_tokens(job, (tmp_path / "model" / "tokenizer.json").read_bytes())
    found = [divergence_of(published, tmp_path / "model", text.ids.long()) for text in tokens.held_out]
    assert found == pytest.approx(report.divergences[report.kept], rel=1e-3)


def test_training_that_only_loses_publishes_what_was_there(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    plain = run_job(model, tmp_path / "plain", RECIPE)
    progress = RecordedProgress()
    distillation = {**texts, "training": RUINOUS}
    found = run_job(model, tmp_path / "trained", RECIPE, distillation=distillation, progress=progress)
    assert report_of(found).kept == 0
    assert any("stays as it was solved" in note for note in progress.notes)
    expected, tensors = tensors_of(plain), tensors_of(found)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("trained", "changing"),
    [("factors", ".lora_"), ("scales", "weight_scale"), ("norms", "norm.weight")],
)
def test_only_what_is_trained_changes(
    model: Path, texts: dict[str, Any], tmp_path: Path, trained: str, changing: str
) -> None:
    only = {part: part == trained for part in ("factors", "scales", "norms")}
    plain = tensors_of(run_job(model, tmp_path / "plain", RECIPE))
    training = {**TRAINING, **only, "epochs": 1}
    found = tensors_of(run_job(model, tmp_path / "own", RECIPE, distillation={**texts, "training": training}))
    different = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    assert different
    assert all(changing in name for name in different)


def test_the_number_of_workers_does_not_matter(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    distillation = {**texts, "training": {**TRAINING, "epochs": 1}}
    one, three = (
        tensors_of(run_job(model, tmp_path / str(workers), RECIPE, distillation=distillation, workers=workers))
        for workers in (1, 3)
    )
    assert all(torch.equal(tensor, three[name]) for name, tensor in one.items())


class Killed(Exception):
    """The process ends here."""


class Dying(Workspace):
    """Commits one epoch, and then the process ends."""

    def commit(self, kind: str, key: str, record: AnyRecord) -> AnyRecord:
        found = super().commit(kind, key, record)
        if kind == EPOCH:
            raise Killed
        return found


def test_a_task_that_was_killed_goes_on_behind_its_last_epoch(
    model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    task, originals = tasks_of(model, texts, tmp_path)
    context = TaskContext(torch.device("cpu"), threads=1)
    workspace = task.workspace()
    for original in originals:
        original.run(context)
    forget(workspace)
    whole = task.compute(context, workspace)
    forget(workspace)

    with pytest.raises(Killed):
        task.compute(context, Dying(workspace.store))
    committed = [info.key for info in workspace.store.list(f"{COMMITS}/{EPOCH}/")]
    assert len(committed) == 1
    resumed = task.compute(context, workspace)

    assert resumed.losses[0] == whole.losses[0]
    assert untimed(resumed) == untimed(whole)
    states = [key for key in committed if key]
    assert states
    assert [workspace.has(blob) for blob in resumed.states] == [True]


def tasks_of(model: Path, texts: Mapping[str, Any], output: Path) -> tuple[Distill, list[Original]]:
    """The tasks of a job's distillation, after the job."""
    from counterweight.pipeline.events import EventLog
    from counterweight.pipeline.opening import open_job
    from counterweight.pipeline.orchestrator import Orchestrator

    document = json.loads(document_of(model, texts, **TRAINING))
    document["spec"]["output"]["uri"] = (output / "artifacts").as_uri()
    job = parse_manifest(json.dumps(document), name="tiny.json", base=None).job
    pool = Watching()
    with EventLog(RecordedProgress()) as log:
        source, tokens = open_job(job, pool, log, here=True)
        Orchestrator(job, source, tokens, pool, "cpu", log).run()
    pool.close()
    (task,) = [task for task in pool.tasks if isinstance(task, Distill)]
    return task, [task for task in pool.tasks if isinstance(task, Original)]


def forget(workspace: Workspace) -> None:
    """Removes what is known of the training."""
    for kind in (EPOCH, Distill.kind):
        for info in list(workspace.store.list(f"{COMMITS}/{kind}/")):
            workspace.store.delete(info.key)


def untimed(record: DistillRecord) -> dict[str, object]:
    return record.model_dump(exclude={"timing"})


def test_windows_that_are_trained_on_are_not_held_out(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    overlapping = {**texts, "held_out": [{**texts["held_out"][0], "skip": 90}]}
    with pytest.raises(RequestError, match=r"held_out\.0: 6 of 8 windows are trained on"):
        run_job(model, tmp_path, RECIPE, distillation=overlapping)


def test_a_residual_store_is_refused(model: Path, texts: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match=r"recipe\.residual"):
        parse_manifest(document_of(model, texts, {**RECIPE, "residual": {}}), name="tiny.json", base=None)


def test_nothing_to_train_is_refused(model: Path, texts: dict[str, Any]) -> None:
    nothing = {"factors": False, "scales": False, "norms": False}
    with pytest.raises(ManifestError, match="expected one to train"):
        parse_manifest(document_of(model, texts, **nothing), name="tiny.json", base=None)


def test_relative_texts_are_relative_to_the_manifest(model: Path, texts: dict[str, Any]) -> None:
    document = document_of(model, {**texts, "held_out": [{"source": {"uri": "held.txt"}, "sequences": 2}]})
    job = parse_manifest(document, name="tiny.json", base="file:///somewhere").job
    assert job.spec.distillation is not None
    assert job.spec.distillation.held_out[0].source.model_dump()["uri"] == "file:///somewhere/held.txt"


def test_jobs_without_a_distillation_keep_their_identity(model: Path, texts: dict[str, Any]) -> None:
    document = json.loads(document_of(model, texts, **TRAINING))
    trained = parse_manifest(json.dumps(document), name="tiny.json", base=None).job
    document["spec"]["distillation"]["training"]["seed"] = 1
    other = parse_manifest(json.dumps(document), name="tiny.json", base=None).job
    del document["spec"]["distillation"]
    plain = parse_manifest(json.dumps(document), name="tiny.json", base=None).job
    assert "distillation" not in json.loads(canonical(plain))
    assert len({canonical(job) for job in (plain, trained, other)}) == 3


def test_the_plan_knows_what_training_takes(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    source = open_model(model.as_uri())

    def plan_of(**training: Any) -> Any:
        return make_plan(parse_manifest(document_of(model, texts, **training), name="tiny.json", base=None).job, source)

    plan = plan_of(**TRAINING)
    task, _ = tasks_of(model, texts, tmp_path)
    student = read_student(TaskContext(torch.device("cpu"), threads=1), task, task.workspace())
    trained = sum(parameter.numel() for parameter, _ in student.trained(task.options).values())
    assert plan.distillation.parameters == trained
    longer = plan_of(**{**TRAINING, "epochs": 4})
    assert longer.flops - plan.flops == longer.distillation.flops - plan.distillation.flops > 0
    assert plan_of(**{**TRAINING, "batch": 64}).distillation.peak_bytes > plan.distillation.peak_bytes
    assert plan_of(**{**TRAINING, "factors": False}).distillation.parameters < trained
    assert plan.largest == "distillation"
