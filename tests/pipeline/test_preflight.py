"""What is wrong with a request is said before Ray, torch or a worker is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from counterweight.pipeline.model_files import positions_of
from counterweight.pipeline.preflight import check_apart, look
from counterweight.workers.errors import RequestError
from tests.inprocess import RecordedProgress, run_job
from tests.models import checkpoint
from tests.patience import PATIENCE
from tests.pipeline.tiny import job_of, write_job

# The command in this process, then what it has loaded: the last line of stdout.
COMMAND = """
import json, os, sys
from counterweight.pipeline.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in ("ray", "torch", "transformers") if name in sys.modules]]))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=1)


def broken_tokenizer(root: Path) -> None:
    (root / "model" / "tokenizer.json").write_text("{}")


def fifo(path: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / path).unlink()
        os.mkfifo(root / path)

    return make


def linked_tokenizer(root: Path) -> None:
    (root / "model" / "tokenizer.json").rename(root / "elsewhere.json")
    (root / "model" / "tokenizer.json").symlink_to(root / "elsewhere.json")


def foreign(root: Path) -> None:
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))


WRONG: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no model": (lambda root: None, ["spec.model.uri=/nope"], "spec.model.uri: file:///nope: no such folder"),
    "an unknown model": (foreign, [], "model_type: 'bloom': expected one of"),
    "no weights": (lambda root: (root / "model" / "model.safetensors").unlink(), [], "neither model.safetensors"),
    "a pipe for a config": (fifo("model/config.json"), [], "a named pipe: expected a regular file"),
    "no tokenizer": (lambda root: (root / "model" / "tokenizer.json").unlink(), [], "no tokenizer.json"),
    "a broken tokenizer": (broken_tokenizer, [], "tokenizer.json: "),
    "a tokenizer elsewhere": (linked_tokenizer, [], "a link out of"),
    "no text": (lambda root: (root / "calibration.txt").unlink(), [], "spec.calibration.source.uri"),
    "a short text": (lambda root: (root / "validation.txt").write_text("w1 w2"), [], "spec.validation.text: 2 tokens"),
    "a pipe for a text": (fifo("validation.txt"), [], "a named pipe: expected a regular file"),
    "a device": (lambda root: None, ["spec.calibration.source.uri=/dev/zero"], "a device: expected a regular file"),
    "an environment": (lambda root: None, ["spec.validation.text.uri=/proc/self/environ"], "0 tokens make 0 windows"),
    "no tokens": (
        lambda root: None,
        ["spec.calibration.source={kind: tokens, uri: nothing.safetensors}"],
        "no such file",
    ),
    "the model's folder": (lambda root: None, ["spec.output.uri=model"], "spec.output.uri: .*in the model's folder"),
    "a folder in it": (lambda root: None, ["spec.output.uri=./model/../model/out"], "in the model's folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_costs_neither_ray_nor_torch(honest: Path, tmp_path: Path, case: str) -> None:
    spoil, overrides, said = WRONG[case]
    root = tmp_path / "job"
    shutil.copytree(honest.parent, root)
    spoil(root)
    options = [part for override in overrides for part in ("--set", override)]
    ran = subprocess.run(
        [sys.executable, "-c", COMMAND, "run", str(root / "job.yaml"), *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    code, loaded = json.loads(ran.stdout.splitlines()[-1])
    doing, line = ran.stderr.splitlines()
    assert doing == "stage looking at the model and its texts"
    assert code == 2
    assert line.startswith("error: ")
    assert re.search(said, line)
    assert loaded == []


def test_what_is_right_is_read_without_torch(honest: Path) -> None:
    code = (
        "import sys\nfrom counterweight.pipeline.manifest import load_manifest\n"
        "from counterweight.pipeline.preflight import look\n"
        "ready = look(load_manifest(sys.argv[1], []).job)\n"
        "print(sorted(ready.texts.found), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(honest)], capture_output=True, text=True, check=True)
    assert ran.stdout == "['spec.calibration.source', 'spec.validation.text'] False\n"


@pytest.mark.parametrize(
    ("output", "model", "apart"),
    [
        ("file:///a/b", "file:///a/b", False),
        ("file:///a/b/c", "file:///a/b", False),
        ("file:///a", "file:///a/b", True),
        ("file:///a/bc", "file:///a/b", True),
        ("s3://bucket/a/b", "s3://bucket/a", False),
        ("s3://bucket/ab", "s3://bucket/a", True),
        ("s3://other/a", "s3://bucket/a", True),
        ("s3://bucket/a", "file:///bucket/a", True),
    ],
)
def test_an_output_lies_outside_the_models_folder(output: str, model: str, apart: bool) -> None:
    if apart:
        check_apart(output, model)
        return
    with pytest.raises(RequestError, match="in the model's folder"):
        check_apart(output, model)


def test_a_link_does_not_hide_that_the_output_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "alias").symlink_to("model")
    with pytest.raises(RequestError, match="in the model's folder"):
        check_apart((tmp_path / "alias" / "out").as_uri(), (tmp_path / "model").as_uri())


def test_looking_leaves_nothing_in_the_output(honest: Path) -> None:
    look(job_of(honest))
    assert [path for path in (honest.parent / "out").rglob("*") if path.is_file()] == []


def test_windows_beyond_the_models_positions_are_noted(tmp_path: Path) -> None:
    progress = RecordedProgress()
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1, max_position_embeddings=16)
    recipe = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}}}
    run_job(tmp_path / "model", tmp_path / "out", recipe, progress=progress, validation=None)
    (note,) = progress.notes
    assert note.startswith("spec.calibration.sequence_length: 32: more than the 16 positions of the model")


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "default"}}, 64),
    ],
)
def test_how_many_positions_a_model_has(config: dict[str, object], known: int | None) -> None:
    assert positions_of(config) == known


def test_windows_of_a_validation_beyond_the_models_positions_are_refused(honest: Path) -> None:
    most = json.loads((honest.parent / "model" / "config.json").read_text())["max_position_embeddings"]
    texts = ("spec.calibration.sequences=1", "spec.validation.windows=1", "spec.calibration.sequence_length=16")
    with pytest.raises(RequestError, match=rf"^spec.validation.sequence_length: {most + 1}: expected at most {most},"):
        look(job_of(honest, *texts, f"spec.validation.sequence_length={most + 1}"))
    look(job_of(honest, *texts, "spec.validation.sequence_length=16"))
