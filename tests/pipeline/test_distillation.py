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
from counterweight.pipeline.events import EventLog
from counterweight.pipeline.manifest import canonical, parse_manifest
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.opening import open_job
from counterweight.pipeline.orchestrator import Orchestrator
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.tokens import read_tokens
from counterweight.workers.context import TaskContext
from counterweight.workers.distillation.training import Training
from counterweight.workers.distilled import read_student
from counterweight.workers.errors import ManifestError, RequestError
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.distill import Distill
from counterweight.workers.tasks.epoch import Epoch, EpochRecord
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.replica import Replica, ReplicaRecord
from counterweight.workers.tasks.task import Task
from counterweight.workers.tensor_blobs import get_tensors
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import COMMITS, Blob, Workspace
from tests.flop_counter import counted
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


class Killed(Exception):
    """The process ends here."""


class Watching(InProcessPool):
    """Keeps the tasks that it ran. fatal: name of one before which the process ends."""

    def __init__(self, workers: int = 1, fatal: str | None = None) -> None:
        super().__init__(workers)
        self.tasks: list[Task[object]] = []
        self._fatal = fatal

    def submit(self, worker: int, task: Task[object]) -> int:
        if task.name == self._fatal:
            raise Killed
        self.tasks.append(task)
        return super().submit(worker, task)

    @property
    def trained(self) -> list[str]:
        """Names of the tasks of training, in order."""
        return [task.name for task in self.tasks if task.trains is not None]


def run_on(pool: InProcessPool, model: Path, texts: Mapping[str, Any], output: Path, **training: Any) -> Published:
    """One job to its end; `output` as in `run_job`."""
    document = json.loads(document_of(model, texts, **training))
    document["spec"]["output"]["uri"] = (output / "artifacts").as_uri()
    job = parse_manifest(json.dumps(document), name="tiny.json", base=None).job
    try:
        with EventLog(RecordedProgress()) as log:
            opened = open_job(job, pool, log, here=True)
            return Orchestrator(job, opened, pool, "cpu", log).run()
    finally:
        pool.close()


def workspace_of(output: Path) -> Workspace:
    return Workspace(open_store((output / "artifacts").as_uri()))


def states(workspace: Workspace) -> dict[str, Blob]:
    """Of every part and every epoch that was finished: place of its record -> its state."""
    found: dict[str, Blob] = {}
    for record in (ReplicaRecord, EpochRecord):
        kind = Replica.kind if record is ReplicaRecord else Epoch.kind
        for info in workspace.store.list(f"{COMMITS}/{kind}/"):
            found[info.key] = record.model_validate_json(workspace.store.read(info.key)).state
    return found


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


REPLICATED: Mapping[str, Any] = {**TRAINING, "replicas": 2, "rounds": 2}


@pytest.mark.parametrize("replicas", [{}, {"replicas": 2, "rounds": 2}, {"replicas": 3}], ids=str)
def test_the_number_of_workers_does_not_matter(
    replicas: dict[str, int], model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    training = {**TRAINING, "epochs": 1, **replicas}
    pools = [Watching(workers) for workers in (1, 2, 3)]
    found = [run_on(pool, model, texts, tmp_path / str(pool.size), **training) for pool in pools]
    one, *others = (tensors_of(published) for published in found)
    for other in others:
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert len({report_of(published).model_dump_json() for published in found}) == 1
    assert len({published.document.id for published in found}) == 1
    used = {worker for worker, kind in pools[2].calls if kind == Replica.kind}
    assert len(used) >= replicas.get("replicas", 1)


def test_more_replicas_are_another_training(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"replicas": 2}, {"replicas": 2, "rounds": 2}]
    found = [
        run_on(Watching(), model, texts, tmp_path / "out", **{**TRAINING, "epochs": 1, **change}) for change in changes
    ]
    assert len({published.document.id for published in found}) == 3
    assert len({report_of(published).divergences for published in found}) == 3


def test_no_state_is_left_when_a_job_is_published(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    pool = Watching()
    run_on(pool, model, texts, tmp_path, **REPLICATED)
    workspace = workspace_of(tmp_path)
    assert len(states(workspace)) == 2 * (2 * 2 + 1)
    assert not any(workspace.has(blob) for blob in states(workspace).values())


@pytest.mark.parametrize(
    ("fatal", "left", "done"),
    [
        ("distillation, epoch 1, round 1, replica 2", 1, 1),
        ("distillation, epoch 1, round 2, replica 1", 2, 2),
        ("distillation, epoch 1, round 2, replica 2", 3, 3),
        ("end of distillation's epoch 1", 2, 4),
        ("distillation, epoch 2, round 2, replica 2", 4, 8),
    ],
)
def test_a_job_that_was_killed_goes_on_behind_what_is_finished(
    fatal: str, left: int, done: int, model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    """left: states that are still of use; done: tasks of training that were finished."""
    whole = Watching()
    expected = tensors_of(run_on(whole, model, texts, tmp_path / "whole", **REPLICATED))
    with pytest.raises(Killed):
        run_on(Watching(2, fatal), model, texts, tmp_path / "killed", **REPLICATED)
    workspace = workspace_of(tmp_path / "killed")
    assert sum(workspace.has(blob) for blob in states(workspace).values()) == left

    resumed = Watching()
    found = tensors_of(run_on(resumed, model, texts, tmp_path / "killed", **REPLICATED))
    assert resumed.trained == whole.trained[done:]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not any(workspace.has(blob) for blob in states(workspace).values())


def test_states_that_are_lost_are_made_again(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    whole = Watching()
    expected = tensors_of(run_on(whole, model, texts, tmp_path / "whole", **REPLICATED))
    dying = Watching(fatal="distillation, epoch 2, round 2, replica 2")
    with pytest.raises(Killed):
        run_on(dying, model, texts, tmp_path / "killed", **REPLICATED)
    workspace = workspace_of(tmp_path / "killed")
    for blob in states(workspace).values():
        workspace.discard(blob)
    resumed = Watching()
    found = tensors_of(run_on(resumed, model, texts, tmp_path / "killed", **REPLICATED))
    assert set(resumed.trained) == set(whole.trained)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not any(workspace.has(blob) for blob in states(workspace).values())


def test_an_epoch_of_the_last_revision_is_taken_up(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """It knew records of epochs alone."""
    whole = Watching()
    expected = tensors_of(run_on(whole, model, texts, tmp_path / "whole", **TRAINING))
    with pytest.raises(Killed):
        run_on(Watching(fatal="distillation, epoch 2"), model, texts, tmp_path / "killed", **TRAINING)
    workspace = workspace_of(tmp_path / "killed")
    for info in list(workspace.store.list(f"{COMMITS}/{Replica.kind}/")):
        workspace.store.delete(info.key)
    resumed = Watching()
    found = tensors_of(run_on(resumed, model, texts, tmp_path / "killed", **TRAINING))
    assert whole.trained == [
        "distillation, epoch 1",
        "end of distillation's epoch 1",
        "distillation, epoch 2",
        "end of distillation's epoch 2",
        "distillation",
    ]
    assert resumed.trained == whole.trained[2:]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_training_that_is_finished_is_not_done_again(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """By another job that shares it; what was on the way to it is gone, as it is from work of the last revision."""
    published = run_on(Watching(), model, texts, tmp_path, **REPLICATED)
    expected = tensors_of(published)
    workspace = workspace_of(tmp_path)
    places = [f"{COMMITS}/{kind}/" for kind in (Replica.kind, Epoch.kind)] + [f"tiny/{published.document.id}/"]
    for info in [info for place in places for info in workspace.store.list(place)]:
        workspace.store.delete(info.key)
    pool = Watching()
    found = tensors_of(run_on(pool, model, texts, tmp_path, **REPLICATED))
    assert pool.trained == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_patience_ends_training_early(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    pool = Watching()
    run_on(pool, model, texts, tmp_path, **{**RUINOUS, "epochs": 5, "replicas": 2})
    epochs = [task.epoch for task in pool.tasks if isinstance(task, Epoch)]
    assert epochs == [1, 2]
    assert not any(workspace_of(tmp_path).has(blob) for blob in states(workspace_of(tmp_path)).values())


def test_a_worker_holds_the_model_between_its_tasks_and_no_longer(
    model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    ran = Watching()
    run_on(ran, model, texts, tmp_path / "out", **{**REPLICATED, "epochs": 1})
    first, second = [task for task in ran.tasks if isinstance(task, Replica)][:2]
    other = next(task for task in ran.tasks if task.trains is None)
    worker = Worker("cpu")
    for original in (task for task in ran.tasks if isinstance(task, Original)):
        worker.run(original)
    forgotten(workspace_of(tmp_path / "out"))
    read: list[str] = []
    held = worker.context.training

    def unread() -> Training:
        read.append("again")
        raise AssertionError

    worker.run(first)
    key = first.training.key()
    one = held.get(key, unread)
    worker.run(second)
    assert held.get(key, unread) is one
    worker.run(other)
    with pytest.raises(AssertionError):
        held.get(key, unread)
    assert read == ["again"]
    worker.close()


def forgotten(workspace: Workspace) -> None:
    """Removes what is known of the training."""
    for kind in (Replica.kind, Epoch.kind, Distill.kind):
        for info in list(workspace.store.list(f"{COMMITS}/{kind}/")):
            workspace.store.delete(info.key)


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


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"rounds": 2}, "rounds: 2: expected 1 unless there are replicas"),
        ({"replicas": 97}, "97 replicas in 1 rounds an epoch: expected at most 96 parts"),
        ({"replicas": 2, "rounds": 49}, "2 replicas in 49 rounds an epoch: expected at most 96 parts"),
        ({"replicas": 0}, "replicas"),
    ],
)
def test_replicas_without_effect_or_work_are_refused(
    training: dict[str, int], message: str, model: Path, texts: dict[str, Any]
) -> None:
    with pytest.raises(ManifestError, match=message):
        parse_manifest(document_of(model, texts, **training), name="tiny.json", base=None)


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
    pool = Watching()
    run_on(pool, model, texts, tmp_path, **TRAINING)
    (task,) = (task for task in pool.tasks if isinstance(task, Distill))
    spec = task.training
    student = read_student(TaskContext(torch.device("cpu"), threads=1), spec, task.workspace())
    trained = sum(parameter.numel() for parameter, _ in student.trained(spec.options).values())
    assert plan.distillation.parameters == trained
    longer = plan_of(**{**TRAINING, "epochs": 4})
    assert longer.flops - plan.flops == longer.distillation.flops - plan.distillation.flops > 0
    assert plan_of(**{**TRAINING, "batch": 64}).distillation.peak_bytes > plan.distillation.peak_bytes
    assert plan_of(**{**TRAINING, "factors": False}).distillation.parameters < trained
    assert plan.largest == "distillation"


class Counting(Watching):
    """Counts products in float32 of the tasks that have to do with training."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def submit(self, worker: int, task: Task[object]) -> int:
        if not isinstance(task, (Original, Replica, Epoch)):
            return super().submit(worker, task)
        tickets: list[int] = []
        work = counted(lambda: tickets.append(super(Counting, self).submit(worker, task)))
        self.flops += work.products32
        return tickets[0]


CASES = {"one": TRAINING, "replicas": REPLICATED, "no factors": {**TRAINING, "epochs": 1, "factors": False}}


@pytest.mark.parametrize("case", CASES)
def test_training_computes_what_is_planned(case: str, model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    pool = Counting()
    run_on(pool, model, texts, tmp_path, **CASES[case])
    job = parse_manifest(document_of(model, texts, **CASES[case]), name="tiny.json", base=None).job
    plan = make_plan(job, open_model(model.as_uri())).distillation
    assert plan is not None
    assert plan.flops == pytest.approx(pool.flops, rel=0.02)


class Weighing(Watching):
    """Knows the bytes of the tensors of every state, by the digest of its blob."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def submit(self, worker: int, task: Task[object]) -> int:
        ticket = super().submit(worker, task)
        if isinstance(task, (Replica, Epoch)):
            record = task.lookup(task.workspace())
            assert record is not None
            tensors = get_tensors(task.workspace(), record.state)
            self.bytes[record.state.sha256] = sum(tensor.nbytes for tensor in tensors.values())
        return ticket


@pytest.mark.parametrize("case", ["one", "replicas"])
def test_states_are_as_large_as_is_planned(case: str, model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    pool = Weighing()
    run_on(pool, model, texts, tmp_path, **CASES[case])
    job = parse_manifest(document_of(model, texts, **CASES[case]), name="tiny.json", base=None).job
    plan = make_plan(job, open_model(model.as_uri())).distillation
    assert plan is not None
    read = [blob for task in pool.tasks if isinstance(task, (Replica, Epoch)) for blob in task.states]
    read += [task.before.state for task in pool.tasks if isinstance(task, Epoch) and task.before is not None]
    read += [task.last.state for task in pool.tasks if isinstance(task, Distill) and task.last.best]
    assert plan.state_written_bytes == sum(pool.bytes.values())
    assert plan.state_read_bytes == sum(pool.bytes[blob.sha256] for blob in read)
    assert plan.replicas == CASES[case].get("replicas", 1)
