"""`plan` refuses what `run` would refuse, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from counterweight.pipeline import plan_text
from counterweight.pipeline.foresight import foresee
from counterweight.pipeline.preflight import look
from counterweight.workers.errors import CounterweightError, RequestError
from tests.patience import PATIENCE
from tests.pipeline.tiny import job_of, run_local, write_job

DEMO = Path(__file__).parents[2] / "manifests" / "demo.yaml"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("template"), layers=2).parent


@pytest.fixture
def manifest(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "job")
    return tmp_path / "job" / "job.yaml"


def nothing(folder: Path) -> None:
    """Leaves the job as it is."""


def without_tokenizer(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()


def output_is_a_file(folder: Path) -> None:
    (folder / "out").write_text("not a folder")


WRONG: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "no such text": (
        nothing,
        ("spec.calibration.source.uri=none.txt",),
        r"spec\.calibration\.source\.uri: .*no such file",
    ),
    "no such validation": (
        nothing,
        ("spec.validation.text.uri=none.txt",),
        r"spec\.validation\.text\.uri: .*no such file",
    ),
    "too short a text": (nothing, ("spec.calibration.sequences=100",), r"make 15 windows of 32: expected at least 100"),
    "positions of the validation": (
        nothing,
        ("spec.validation.sequence_length=257",),
        r"spec\.validation\.sequence_length: 257: expected at most 256",
    ),
    "no tokenizer": (without_tokenizer, (), r"the model has no tokenizer\.json"),
    "a file for an output": (output_is_a_file, (), r"spec\.output\.uri: "),
    "no place for an output": (nothing, ("spec.output.uri=/proc/x",), r"spec\.output\.uri: "),
    "no such model": (nothing, ("spec.model.uri=meta-llama/Llama-3",), r"no such folder.*hf:meta-llama/Llama-3"),
    "a pattern that matches nothing": (
        nothing,
        ("spec.recipe.keep=[lm_head, lm_heads]",),
        r"spec\.recipe\.keep\.1: 'lm_heads': matches",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_by_both(name: str, manifest: Path) -> None:
    spoil, overrides, message = WRONG[name]
    spoil(manifest.parent)
    job = job_of(manifest, *overrides)
    with pytest.raises(RequestError, match=message):
        foresee(job)
    if "matches" not in message:  # patterns are looked at when the model is open
        with pytest.raises(CounterweightError, match="" if "output" in message else message):
            look(job)


def test_a_job_that_can_run_is_planned_and_leaves_nothing(manifest: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")}
    found = foresee(job_of(manifest))
    assert {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")} == before
    assert found.reuse == ["nothing: no block was finished before"]
    assert found.notes == ()
    assert 0 < found.plan.artifact_bytes < found.plan.source_bytes


def test_a_calibration_beyond_the_models_positions_is_noted(manifest: Path) -> None:
    shorter = ("spec.calibration.sequences=1", "spec.validation.sequence_length=32")
    found = foresee(job_of(manifest, "spec.calibration.sequence_length=300", *shorter))
    (note,) = found.notes
    assert note.startswith("spec.calibration.sequence_length: 300: more than the 256 positions of the model")


def test_gpus_that_are_not_here_are_noted(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterweight.pipeline.foresight.GPUS", ())
    found = foresee(job_of(manifest, "spec.resources.gpus_per_worker=1"))
    assert found.notes == ("this machine has no GPU: workers here would compute on the CPU",)


def test_the_artifacts_bits_are_those_of_the_report(manifest: Path) -> None:
    """Of whole ranks and whole groups nothing is a guess."""
    job = job_of(manifest)
    published = run_local(job)
    plan = foresee(job).plan
    assert plan.bits_per_weight == pytest.approx(published.document.bits_per_weight.total, rel=1e-3)
    weights = sum(entry.size for path, entry in published.document.files.items() if path.endswith(".safetensors"))
    assert plan.artifact_bytes == pytest.approx(weights, rel=0.1)  # of a model this small headers count


# The command in a fresh interpreter, then what of these it has loaded: the last line of stdout.
def test_a_gpu_is_named_for_workers_that_use_none(tmp_path: Path) -> None:
    job = job_of(DEMO, f"spec.output.uri={tmp_path}")
    (time,) = (text for label, text in plan_text.rows(foresee(job, "H100-80G"), 0) if label == "time")
    assert time == "not known: H100-80G is a GPU, and workers use none (spec.resources.gpus_per_worker: 0)"


PLAN = """
import sys
from counterweight.pipeline.cli import main
code = main(["plan", *sys.argv[1:]])
print(code, *sorted({"torch", "transformers", "ray"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("rows", [False, True], ids=["a text", "a data set"])
def test_nothing_is_computed_with_torch(rows: bool, tmp_path: Path) -> None:
    settings = [f"spec.output.uri={tmp_path / 'out'}", "spec.resources.gpus_per_worker=1"]
    if rows:
        text = (DEMO.parent / "demo" / "text" / "calibration.txt").read_text(encoding="utf-8")
        lines = [json.dumps({"text": part}) for part in text.split("\n\n")]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        settings.append(f"spec.calibration.source={{kind: dataset, path: {tmp_path / 'rows.jsonl'}}}")
    options = [str(DEMO), "--device", "H100-80G", *(word for setting in settings for word in ("--set", setting))]
    ran = subprocess.run([sys.executable, "-c", PLAN, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert ran.stdout.splitlines()[-1:] == ["0"], ran.stderr
    assert "calibration      16,384 tokens" in ran.stdout
