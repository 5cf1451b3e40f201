"""Tasks of the lm-evaluation-harness: what is read, what is refused, what bounds mean; with the harness, what models score."""

from __future__ import annotations

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight import load_model
from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.verdict import GateReport
from counterweight.pipeline.estimate.asked import CHOICES, NEW_TOKENS, Asked, asked
from counterweight.pipeline.judging import task_files
from counterweight.pipeline.judging.task_files import read_documents
from counterweight.pipeline.judging.tasks import benchmarks, judge_tasks
from counterweight.pipeline.manifest.validation import HarnessTask, Validation
from counterweight.pipeline.model_source import open_model
from counterweight.pipeline.plan import make_plan
from counterweight.pipeline.rates import UNMEASURED
from counterweight.pipeline.service.roots import Roots
from counterweight.workers.calibration.source import TextSource
from counterweight.workers.errors import RequestError
from counterweight.workers.harness import TaskDocument
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.harness import TaskScore
from tests.models import VOCABULARY
from tests.pipeline.tiny import job_of, local_path, run_local, write_job

CONFIG = """\
task: words
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
"""

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (make harness)")


def write_task(folder: Path, config: str = CONFIG, items: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(3)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(count))

    rows = [
        {"question": words(6), "choices": [f" {words(2)}" for _ in range(3)], "answer": i % 3} for i in range(items)
    ]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "words.yaml").write_text(config)
    return folder / "words.yaml"


def validation(path: Path, **fields: object) -> Validation:
    return Validation(
        text=TextSource(uri="file:///text.txt"),
        tasks={"words": HarnessTask.model_validate({"uri": path.as_uri(), **fields})},
    )


@pytest.fixture
def with_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed: reading needs nothing of it."""
    monkeypatch.setattr(task_files, "installed", lambda: True)


@pytest.mark.usefixtures("with_harness")
def test_a_task_is_read_with_its_rows_and_the_models_tokenizer(tmp_path: Path) -> None:
    path = write_task(tmp_path / "tasks")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    model = open_store((tmp_path / "model").as_uri())
    found = read_documents(validation(path, limit=5, num_fewshot=2), model)
    assert found is not None
    task = found.tasks["words"]
    assert (task.limit, task.num_fewshot, len(task.rows["test"])) == (5, 2, 24)
    assert task.config["doc_to_text"] == "{{question}}"
    assert not task.config.keys() & {"dataset_path", "dataset_kwargs", "task"}
    assert found.tokenizer == {"tokenizer.json": "{}"}
    assert read_documents(Validation(text=TextSource(uri="file:///text.txt")), model) is None


@pytest.mark.usefixtures("with_harness")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("doc_to_choice: choices", "doc_to_choice: !function utils.choices"), "without tags such as !function"),
        (("data_files: {test: words.jsonl}", "trust: 1"), "data_files: expected a mapping of splits"),
        (("test_split: test", "test_split: other"), "no file for the split 'other'"),
        (("words.jsonl", "../words.jsonl"), "expected a .json or .jsonl file beside"),
        (("words.jsonl", "words.parquet"), "expected a .json or .jsonl file"),
        (("words.jsonl", "words.yaml.json"), "no such file"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_anything_runs(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    path = write_task(tmp_path / "tasks", CONFIG.replace(*change))
    with pytest.raises(RequestError, match=r"^spec.validation.tasks.words.uri: ") as caught:
        read_documents(validation(path), open_store(tmp_path.as_uri()))
    assert said in str(caught.value)


def test_without_the_harness_a_job_with_tasks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "installed", lambda: False)
    with pytest.raises(RequestError, match=r"^spec.validation.tasks: .*pip install 'counterweight\[lm-eval\]'"):
        read_documents(validation(write_task(tmp_path)), open_store(tmp_path.as_uri()))


def test_a_service_takes_no_tasks(tmp_path: Path) -> None:
    """A template runs as a program does, and the service's machines are not the submitter's."""
    path = write_job(tmp_path, layers=1)
    roots = Roots.parse([tmp_path.as_uri()])
    assert roots.refused(job_of(path)) == []
    task = f"spec.validation.tasks={{words: {{uri: '{write_task(tmp_path)}'}}}}"
    (line,) = roots.refused(job_of(path, task))
    assert line.startswith("spec.validation.tasks: expected none here")


def score(*items: float, better: bool = True) -> dict[str, TaskScore]:
    mean = sum(items) / len(items)
    return {"words": TaskScore(items={"acc": items}, scores={"acc": mean}, higher_is_better={"acc": better})}


def judged(original: dict[str, TaskScore], compressed: dict[str, TaskScore], **fields: Any) -> GateReport:
    task = HarnessTask.model_validate({"uri": "file:///words.yaml", **fields})
    (gate,) = judge_tasks({"words": task}, {"baseline": original, "quantized": compressed, "compensated": compressed})
    return gate


def test_a_drop_beyond_its_bound_fails_where_it_is_not_chance() -> None:
    original, compressed = score(1, 1, 1, 0), score(1, 0, 0, 0)
    gate = judged(original, compressed, max_drop={"acc": 0.25})
    assert (gate.measured, gate.passed, gate.beyond) == (0.5, False, 0.25)
    assert gate.field == "spec.validation.tasks.words.max_drop.acc"
    assert gate.said == "0.5000 worse (acc 0.2500, original 0.7500, p 0.25): expected at most 0.25"
    assert judged(original, compressed, max_drop={"acc": 0.5}).passed
    # Two items of four may well be chance.
    assert judged(original, compressed, max_drop={"acc": 0.25}, significance=0.05).passed
    assert not judged(original, compressed, max_drop={"acc": 0.25}, significance=0.3).passed
    many = judged(score(*[1] * 20), score(*[1] * 10, *[0] * 10), max_drop={"acc": 0.25}, significance=0.01)
    assert not many.passed


def test_of_a_metric_of_which_less_is_better_a_rise_is_the_drop() -> None:
    gate = judged(score(1.5, 2.5, better=False), score(2.5, 3.5, better=False), max_drop={"acc": 0.5})
    assert (gate.measured, gate.passed) == (1.0, False)
    assert judged(score(2.5, 3.5, better=False), score(1.5, 2.5, better=False), max_drop={"acc": 0.0}).passed


def test_a_bound_on_a_metric_that_the_task_does_not_have_is_refused() -> None:
    with pytest.raises(RequestError, match=r"max_drop.f1: expected one of acc$"):
        judged(score(1), score(1), max_drop={"f1": 0.5})
    whole = {"words": TaskScore(items={}, scores={"acc": 0.5}, higher_is_better={"acc": True})}
    assert judged(whole, whole, max_drop={"acc": 0.5}).passed
    with pytest.raises(RequestError, match=r"^spec.validation.tasks.words.significance: 0.05: expected null"):
        judged(whole, whole, max_drop={"acc": 0.5}, significance=0.05)
    assert benchmarks({}) == {}


def with_special_tokens(manifest: Path) -> Path:
    """The harness puts a beginning or an end before what has no context, and asks the tokenizer for one."""
    path = manifest.parent / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "w1", "eos_token": "w2"}))
    return manifest


@needs_harness
def test_scores_are_those_of_the_harness_own_route(tmp_path: Path) -> None:
    """The same file on the same model through `HFLM(pretrained=folder)`, item by item; and the quantized artifact too, which
    stock transformers loads."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manifest = with_special_tokens(write_job(tmp_path / "job", layers=2))
    path = write_task(tmp_path / "tasks")
    tasks = f"spec.validation.tasks={{words: {{uri: '{path}', max_drop: {{acc: 1.0}}}}}}"
    coarse = ("spec.recipe.weights.bits=2", "spec.recipe.weights.quantizer={kind: rtn}")
    published = run_local(job_of(manifest, tasks, *coarse))
    artifact = local_path(published.uri)
    report = Report.model_validate_json((artifact / "report" / "report.json").read_bytes())
    found = report.benchmarks["words"]
    assert found.items == 24
    (gate,) = report.gates
    assert (gate.field, gate.passed) == ("spec.validation.tasks.words.max_drop.acc", True)
    assert gate.measured == pytest.approx(found.scores["baseline"]["acc"] - found.scores["compensated"]["acc"])
    assert set(found.scores) == {"baseline", "quantized", "compensated"}
    absolute = CONFIG.replace("words.jsonl", str(tmp_path / "tasks" / "words.jsonl")).replace(
        "task: words", "task: stock"
    )
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "stock.yaml").write_text(absolute)
    manager = TaskManager(include_path=str(tmp_path / "stock"), include_defaults=False)
    for variant, folder in (("baseline", manifest.parent / "model"), ("quantized", artifact)):
        stock = HFLM(pretrained=str(folder), dtype=torch.float32, device="cpu", batch_size=8)
        expected = simple_evaluate(model=stock, tasks=["stock"], task_manager=manager, bootstrap_iters=0)
        assert found.scores[variant]["acc"] == expected["results"]["stock"]["acc,none"]
    assert len({scores["acc"] for scores in found.scores.values()}) > 1
    assert "Tasks" in (artifact / "report" / "report.html").read_text()


@needs_harness
@torch.no_grad()
def test_the_harness_own_route_takes_a_branch_where_weights_are_unpacked_at_once(tmp_path: Path) -> None:
    """`pretrained=FOLDER,peft=FOLDER/compensation`, of a copy whose config.json says `dequantize` (docs/serving.md)."""
    from lm_eval.models.huggingface import HFLM

    manifest = with_special_tokens(write_job(tmp_path / "job", layers=1))
    coarse = ("spec.recipe.weights.bits=2", "spec.recipe.compensation={kind: svd, rank: {count: 8}}")
    artifact = local_path(run_local(job_of(manifest, *coarse)).uri)
    copy = shutil.copytree(artifact, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (copy / "config.json").write_text(json.dumps(config))
    ids = torch.arange(3, 51).view(2, 24)
    model = HFLM(pretrained=str(copy), peft=str(copy / "compensation"), device="cpu", batch_size=8).model
    ours, without = (
        load_model(artifact.as_uri(), compensated=compensated)(ids).logits.float() for compensated in (True, False)
    )
    assert (model(ids).logits.float() - ours).norm() < 0.2 * (without - ours).norm()


@needs_harness
def test_what_the_harness_refuses_is_named(tmp_path: Path) -> None:
    manifest = with_special_tokens(write_job(tmp_path / "job", layers=1))
    wrong = write_task(tmp_path / "wrong", CONFIG.replace("{{question}}", "{{questions}}"))
    with pytest.raises(RequestError, match=r"spec.validation.tasks.words: "):
        run_local(job_of(manifest, f"spec.validation.tasks={{words: {{uri: '{wrong}'}}}}"))


def documented(rows: int = 10, limit: int | None = None, shots: int | None = None, **config: object) -> TaskDocument:
    """A task whose rows have 30 characters of text, 10 tokens."""
    row: dict[str, Any] = {"question": "q" * 24, "choices": ["aaa", "bbb"], "answer": 1}
    asked_of = {"output_type": "multiple_choice", "doc_to_choice": "choices", "test_split": "test", **config}
    return TaskDocument.model_validate(
        {"config": asked_of, "rows": {"test": [row] * rows}, "limit": limit, "num_fewshot": shots}
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (documented(), Asked(10 * 2 * 10)),
        (documented(limit=3), Asked(3 * 2 * 10)),
        (documented(shots=2), Asked(10 * 2 * 30)),
        (documented(num_fewshot=1), Asked(10 * 2 * 20)),
        (documented(doc_to_choice=["A", "B", "C"]), Asked(10 * 3 * 10)),
        (documented(doc_to_choice="{{choices}}"), Asked(10 * CHOICES * 10)),
        (documented(output_type="loglikelihood"), Asked(10 * 10)),
        (documented(output_type="generate_until"), Asked(10 * 10, 10 * NEW_TOKENS)),
        (
            documented(output_type="generate_until", generation_kwargs={"max_gen_toks": 7}, limit=2),
            Asked(2 * 10, 2 * 7),
        ),
        (documented(test_split=None, validation_split="test"), Asked(10 * 2 * 10)),
        (documented(rows=0), Asked()),
        (documented(test_split=None), Asked()),
    ],
)
def test_what_a_task_asks_is_counted_from_its_rows(task: TaskDocument, expected: Asked) -> None:
    assert asked([task]) == expected
    assert asked([task, task]) == expected + expected


@pytest.mark.usefixtures("with_harness")
def test_the_plan_has_the_time_of_tasks(tmp_path: Path) -> None:
    """Of all models, and longer the more is asked."""
    job = job_of(write_job(tmp_path, layers=1))
    source = open_model(job.spec.model.uri)

    def planned(limit: int) -> float:
        asking = validation(write_task(tmp_path / "tasks"), limit=limit)
        asked_job = job.model_copy(update={"spec": job.spec.model_copy(update={"validation": asking})})
        found = make_plan(asked_job, source, rates=UNMEASURED, documents=read_documents(asking, source.store))
        assert found.estimate is not None
        assert found.estimate.steps["tasks"] <= found.estimate.stages["whole models"]
        return found.estimate.steps["tasks"]

    assert planned(12) == pytest.approx(2 * planned(6), rel=0.05)
