"""What a model writes itself, against transformers' own model and its own distribution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from counterweight.workers.errors import CheckpointError
from counterweight.workers.tasks.sample import Sample
from counterweight.workers.worker import Worker
from tests.inprocess import local, run_job
from tests.models import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    checkpoint("llama", directory, num_hidden_layers=2)
    return directory


def drawn(model: Path, **changes: object) -> Tensor:
    fields = {"source": model.as_uri(), "compute_dtype": "float32", "sequences": 20, "length": 12}
    spec = Sample.model_validate({**fields, "temperature": 1.0, "seed": 0, **changes})
    return torch.tensor(Worker().run(spec))


def test_nearly_without_temperature_it_is_the_most_probable_continuation(model: Path) -> None:
    found = drawn(model, temperature=1e-3)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = whole.generate(
        found[:, :1], max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0, min_new_tokens=11
    )
    assert torch.equal(found, expected)


def test_windows_have_their_shape_and_their_seed(model: Path) -> None:
    first = drawn(model)
    assert first.shape == (20, 12)
    assert torch.equal(first, drawn(model))
    assert not torch.equal(first, drawn(model, seed=1))
    assert not torch.equal(first, drawn(model, temperature=0.3))


def test_the_first_drawn_token_has_the_models_distribution(model: Path) -> None:
    found = drawn(model, sequences=1500, length=2)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(found[:, :1]).logits[:, 0].softmax(-1).mean(0)
    share = torch.bincount(found[:, 1], minlength=len(expected)) / len(found)
    assert (share - expected).abs().max() < 0.03
    assert (share - 1 / len(expected)).abs().max() > 0.03  # a uniform draw would not be it


def test_the_state_of_torchs_generator_is_left_alone(model: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn(model)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_job_is_calibrated_on_what_its_model_writes(model: Path, tmp_path: Path) -> None:
    recipe = {"weights": {"bits": 4, "group_size": 32}}
    published = run_job(model, tmp_path, recipe, calibration={"source": {"kind": "model", "temperature": 0.9}})
    report = json.loads((local(published) / "report" / "report.json").read_text())
    assert report["calibration"]["source"] == {"kind": "model", "temperature": 0.9}
    assert report["calibration"]["sequences"] == 8
    other = run_job(model, tmp_path, recipe, calibration={"source": {"kind": "model"}, "seed": 3})
    assert other.document.id != published.document.id


def test_a_checkpoint_without_a_block_is_refused(model: Path, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError):
        drawn(tmp_path)
