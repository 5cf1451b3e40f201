"""What makes the command pleasant: version, short help, completion, a manifest to begin with, where `pull` may write."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from counterweight.pipeline.cli import main
from counterweight.pipeline.manifest import load_manifest
from counterweight.pipeline.starter import Choices, starter
from counterweight.workers.errors import UnsupportedModelError
from tests.inprocess import local, run_job
from tests.models import MOE, Case, checkpoint, write_text
from tests.pipeline.tiny import write_job


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("artifact")
    checkpoint("llama", place / "model", torch.bfloat16)
    return local(run_job(place / "model", place / "out", {"weights": {"bits": 4, "group_size": 32}})).as_uri()


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"counterweight {importlib.metadata.version('counterweight')}\n"


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["status"], ["push"]])
def test_help_has_a_short_name(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "-h"]) == 0
    short = capsys.readouterr().out
    assert main([*command, "--help"]) == 0
    assert capsys.readouterr().out == short
    assert "Usage: " in short


def test_shells_complete_it() -> None:
    asked = {"_COUNTERWEIGHT_COMPLETE": "complete_bash", "COMP_WORDS": "counterweight pu", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['counterweight']; from counterweight.pipeline.cli import app; app()"
    ran = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True)
    assert ran.stdout.split() == ["pull", "push"], ran.stderr


class TestInit:
    @pytest.fixture
    def model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.chdir(tmp_path)
        checkpoint("llama", tmp_path / "my model", torch.bfloat16)
        return "my model"

    def test_what_it_writes_is_a_job_that_can_be_planned(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        write_text(Path("a.txt"), 40_000)
        write_text(Path("b.txt"), 1_000)
        assert main(["init", model, "--text", "a.txt", "--validation", "b.txt", "--output", "here"]) == 0
        assert capsys.readouterr().out == "job.yaml\n"
        job = load_manifest("job.yaml").job
        assert job.metadata.name == "my-model"
        assert job.spec.calibration.sequence_length == 256  # the model's positions
        assert job.spec.calibration.compute_dtype == "bfloat16"
        assert main(["plan", "job.yaml"]) == 0

    def test_every_line_that_is_commented_out_is_right_too(self, model: str) -> None:
        text = starter(model, model, Choices(text="a.txt", held="b.txt"))
        uncommented = re.sub(r"^(\s+)# (?=[a-z]+: )", r"\1", text, flags=re.MULTILINE)
        assert uncommented != text
        Path("all.yaml").write_text(uncommented)
        recipe = load_manifest("all.yaml").job.spec.recipe
        assert recipe.activations is not None
        assert recipe.overrides

    def test_it_replaces_nothing(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("job.yaml").write_text("mine")
        assert main(["init", model]) == 2
        assert "job.yaml: there already" in capsys.readouterr().err
        assert Path("job.yaml").read_text() == "mine"

    def test_paths_are_those_of_the_working_directory(self, model: str, tmp_path: Path) -> None:
        Path("jobs").mkdir()
        assert main(["init", model, "jobs/one.yaml"]) == 0
        assert load_manifest("jobs/one.yaml").job.spec.model.uri == (tmp_path / model).as_uri()

    def test_experts_are_told_of(self, tmp_path: Path) -> None:
        checkpoint(Case("qwen3_moe", MOE), tmp_path / "moe", torch.bfloat16)
        assert "# experts: " in starter(str(tmp_path / "moe"), "moe", Choices())

    def test_an_unknown_model_is_refused(self, model: str) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        (Path(model) / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
        with pytest.raises(UnsupportedModelError):
            starter(model, model, Choices())


class TestPull:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("destination", ["hf:me/model", "s3://bucket/x", "https://a/b"])
    def test_a_uri_is_no_destination(
        self,
        destination: str,
        artifact: str,
        here: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert main(["pull", artifact, destination]) == 2
        assert f"error: {destination}: expected a folder on this machine" in capsys.readouterr().err
        assert list(here.iterdir()) == []

    def test_a_folder_with_something_else_is_none(
        self, artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        assert main(["pull", artifact, str(tmp_path)]) == 2
        assert "holds notes.txt, which is not of the artifact" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_pull_that_was_cut_off_goes_on(self, artifact: str, tmp_path: Path) -> None:
        (tmp_path / "config.json.partial").write_text("{")
        (tmp_path / "ledger.json").write_text("half")
        assert main(["pull", artifact, tmp_path.as_uri()]) == 0
        assert main(["verify", str(tmp_path), "--json"]) == 0

    def test_with_json_files_are_not_told(self, artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", artifact, "--json"]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("option", "lines"), [("--quiet", 0), ("--verbose", 20)])
def test_how_much_a_run_says(
    option: str, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "none")
    assert main(["run", str(write_job(tmp_path, layers=1)), option]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("file:///")
    assert len(err.splitlines()) >= lines if lines else err == ""
    if lines:
        assert re.search(r"^ +\d+\.\d s  task_finished  task: block 0", err, re.MULTILINE)
