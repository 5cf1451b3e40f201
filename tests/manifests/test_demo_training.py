"""The script that trains the demo model, on a library of a few files."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[2] / "manifests" / "demo" / "train.py"
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "training.json")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module; dataclasses look their module up in `sys.modules`, so it has to be there."""
    spec = importlib.util.spec_from_file_location("demo_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_train"]


@pytest.fixture(autouse=True)
def global_torch_state() -> Iterator[None]:
    """The script sets the seed and the thread count of its process; here that process is everyone's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of the real library: two to train on and one (`ast.py`) of the evaluation part."""
    root = tmp_path_factory.mktemp("library")
    for name in ("argparse.py", "typing.py", "ast.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, root / name)
    return root


def test_steps_makes_a_whole_model_and_nothing_else(script: ModuleType, library: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    script.main(["--steps", "3", "--output", str(output)], library=library)
    record = json.loads((output / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] == 3
    assert record["command"] == "python manifests/demo/train.py --steps 3"
    assert record["threads"] == 1
    assert {path.name for path in output.iterdir()} == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert {path.stat().st_mode for path in output.iterdir()} == {ordinary.stat().st_mode}
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    # Three steps: no better than a guess among 1024 tokens, and worse than one that knows how to hedge.
    assert 300 < record["evaluation_perplexity"] < 5000
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 1024


def test_minutes_ends_the_run_by_the_clock(script: ModuleType, library: Path, tmp_path: Path) -> None:
    script.main(["--minutes", "0.02", "--output", str(tmp_path)], library=library)
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["seconds"] >= 1.2
    assert record["command"] == "python manifests/demo/train.py --minutes 0.02"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--steps", "0"], ["--minutes", "-1"], ["--minutes", "nan"], ["--steps", "1", "--minutes", "1"]],
)
def test_refuses_all_but_one_length_above_zero(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main([*arguments, "--output", str(tmp_path / "model")])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_training_lowers_the_loss_and_repeats(script: ModuleType) -> None:
    tokens = torch.arange(2000) % 7
    budget = script.Budget(steps=5, minutes=None)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        model = script.new_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses.append(script.train(model, tokens, budget, print).final_loss)
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert losses[0] == losses[1]
    # ln 1024 = 6.9 is the loss of a guess; the mean over the five steps is below it, the first step's is above.
    assert losses[0] < 6.5


def test_only_matrices_decay(script: ModuleType) -> None:
    matrices, gains = script.new_optimizer(script.new_model()).param_groups
    assert (matrices["weight_decay"], gains["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in gains["params"]} == {1}
    assert len(gains["params"]) == 2 * 6 + 1


def test_learning_rate_warms_up_and_decays(script: ModuleType) -> None:
    rates = [script.learning_rate(step / 1000) for step in range(1001)]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(3e-3)
    peak = rates.index(max(rates))
    assert peak == 30
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.05 * 3e-3)
    # Half way down the cosine is half way between its ends.
    assert script.learning_rate((1 + 0.03) / 2) == pytest.approx(3e-3 * (1 + 0.05) / 2)


def test_publish_replaces_files_and_writes_the_record_last(script: ModuleType, tmp_path: Path) -> None:
    finished, output = tmp_path / "finished", tmp_path / "output"
    finished.mkdir()
    output.mkdir()
    for name in FILES:
        (finished / name).write_text("new", encoding="utf-8")
    (output / "config.json").write_text("old", encoding="utf-8")
    # A directory in the way of the weights: that file cannot get there.
    (output / "model.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        script.publish(finished, output)
    assert not (output / "training.json").exists()
    shutil.rmtree(output / "model.safetensors")
    # Called again, it finishes what was left.
    script.publish(finished, output)
    assert {path.name: path.read_text(encoding="utf-8") for path in output.iterdir()} == dict.fromkeys(FILES, "new")
