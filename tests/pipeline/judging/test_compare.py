"""Models side by side: ours, what transformers loads of others, and the original, all on the same tokens."""

from __future__ import annotations

import json
import shutil
from math import exp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from counterweight.pipeline.cli import main
from counterweight.pipeline.judging.compare import Row, compare
from counterweight.pipeline.judging.compare_page import render_comparison
from counterweight.pipeline.judging.wanted import Wanted
from counterweight.workers.errors import RequestError
from tests.models import checkpoint
from tests.pipeline.tiny import job_of, local_path, run_local, write_job

PADDED = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's folder: `model`, `out`, and `foreign`, its artifact as a checkpoint of compressed-tensors."""
    manifest = write_job(tmp_path_factory.mktemp("job"), layers=2)
    published = run_local(job_of(manifest))
    shutil.copytree(local_path(published.uri), manifest.parent / "foreign")
    (manifest.parent / "foreign" / "artifact.json").unlink()
    return manifest.parent


@pytest.fixture(scope="module")
def rows(root: Path) -> tuple[Row, ...]:
    return compare([(root / name).as_uri() for name in ("out/tiny", "foreign", "model")])


def test_each_model_has_the_figures_that_its_report_or_transformers_has(root: Path, rows: tuple[Row, ...]) -> None:
    original, ours, foreign, plain = rows
    report = json.loads(next(root.glob("out/tiny/*/report/report.json")).read_text())
    assert [row.kind for row in rows] == ["original", "counterweight", "compressed-tensors", "plain"]
    assert original.texts["text"].model_dump() == report["baseline"]
    assert ours.texts["text"].model_dump() == report["compensated"]
    # Without its branch, which lies beside the checkpoint.
    assert foreign.texts["text"].model_dump() == pytest.approx(report["quantized"], rel=1e-4, abs=1e-6)
    assert plain.texts["text"].perplexity == pytest.approx(original.texts["text"].perplexity, rel=1e-6)
    assert plain.texts["text"].kl == pytest.approx(0.0, abs=1e-6)
    words = [int(word[1:]) for word in (root / "validation.txt").read_text().split()]
    windows = torch.tensor(words).unflatten(0, (7, 32))
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in windows]
    assert original.texts["text"].perplexity == pytest.approx(exp(sum(losses) / 7), rel=1e-5)


def test_bits_are_what_lies_on_disk_for_each_weight(root: Path, rows: tuple[Row, ...]) -> None:
    original, ours, foreign, plain = rows
    files = {"model": plain, "foreign": foreign}
    assert {name: row.bytes for name, row in files.items()} == {
        name: sum(path.stat().st_size for path in (root / name).glob("*.safetensors")) for name in files
    }
    assert original.bits == pytest.approx(16.0)
    assert plain.bits == pytest.approx(original.bits, rel=0.1)  # and a header
    assert foreign.bits < ours.bits < original.bits


def test_the_page_shows_every_model_and_the_front(rows: tuple[Row, ...]) -> None:
    page = render_comparison(rows)
    for row in rows:
        assert row.name in page
    assert "Pareto front" in page
    assert "<script" not in page


def test_the_command_prints_a_table_or_facts_and_writes_a_page(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--windows", "1"]
    assert main(["compare", str(root / "out" / "tiny"), *few, "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert [line.split()[0] for line in table] == ["model", "original", table[2].split()[0]]
    assert table[2].startswith("tiny/")
    assert "the original on 1 windows" in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.html"}
    text = ["--text", str(root / "validation.txt"), "--sequence-length", "16"]
    assert main(["eval", str(root / "foreign"), "--against", str(root / "model"), *text, *few, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in facts] == ["original", "compressed-tensors"]


def refused(uri: Path, *, against: Path | None = None, text: Path | None = None) -> str:
    original, words = (None if path is None else path.as_uri() for path in (against, text))
    wanted = Wanted(against=original, text=words, sequence_length=16, windows=1)
    with pytest.raises(RequestError) as caught:
        compare([uri.as_uri()], wanted)
    return str(caught.value)


def test_what_cannot_be_compared_is_refused_in_a_line(root: Path, tmp_path: Path) -> None:
    text, model = root / "validation.txt", root / "model"
    assert refused(root / "foreign").startswith("--against: expected the original")
    assert refused(root / "foreign", against=model).startswith("--text: no artifact among the models")
    assert "no artifact.json and no latest.json, nor config.json" in refused(tmp_path, against=model, text=text)
    checkpoint("llama", tmp_path / "other", torch.bfloat16, num_hidden_layers=2, seed=1)
    assert "the model that tiny was made from" in refused(root / "out" / "tiny", against=tmp_path / "other")


def test_a_checkpoint_that_transformers_would_complete_with_random_weights_is_refused(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(PADDED)}
    save_file(tensors, path, metadata={"format": "pt"})
    said = refused(tmp_path / "model", against=root / "model", text=root / "validation.txt")
    assert f"transformers finds no {PADDED}.weight (1 such): it would invent them" in said


def test_a_quantization_that_nothing_here_can_run_is_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    said = refused(tmp_path / "model", against=root / "model", text=root / "validation.txt")
    assert "transformers cannot load it here (aqlm): " in said


def test_a_gpu_that_is_not_there_is_no_cpu(root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RequestError, match=r"^--device: cuda: torch finds no GPU"):
        compare([(root / "out" / "tiny").as_uri()], wanted=Wanted(device="cuda"))
