"""What an engine is told of an artifact, and what it is refused."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from counterweight import load_model
from counterweight.kernels.linear import CompensatedLinear
from counterweight.pipeline.serving.artifact import ServedArtifact
from counterweight.pipeline.serving.intake import Intake
from counterweight.pipeline.serving.served import served
from counterweight.workers.block import CompressedLinear
from counterweight.workers.errors import CheckpointError, CounterweightError
from tests.inprocess import local, run_job
from tests.models import checkpoint, read_tensors

RECIPE = {
    "weights": {"bits": 3, "group_size": 32, "quantizer": {"kind": "rtn"}},
    "compensation": {"kind": "svd", "rank": {"count": 4}, "factor_bits": 8},
    "residual": {"channels_per_chunk": 64},
    "keep": ["lm_head", "*.q_proj"],
}
LAYER = "model.layers.1.mlp.down_proj"
KEPT = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    checkpoint("llama", place / "model", torch.float32)
    return local(run_job(place / "model", place / "output", RECIPE))


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder)


def filled(artifact: ServedArtifact, tensors: dict[str, Tensor], *modules: str) -> Intake:
    intake = Intake(artifact, modules)
    for module in modules:
        for name in artifact.expected(module):
            intake.put(module, name, tensors[f"{module}.{name}"])
    return intake


def test_a_linear_is_load_model_s(folder: Path, tensors: dict[str, Tensor]) -> None:
    artifact = pickle.loads(pickle.dumps(ServedArtifact.open(folder)))
    intake = filled(artifact, tensors, LAYER, KEPT)
    intake.expect_all()
    linear = intake.take(LAYER)
    assert isinstance(linear, CompressedLinear)
    assert torch.equal(torch.as_tensor(intake.take(KEPT)), tensors[f"{KEPT}.weight"])
    ours = load_model(folder.as_uri(), residual="all").get_submodule(LAYER)
    assert isinstance(ours, CompensatedLinear)
    x = torch.randn(3, ours.in_features)
    everything = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(served(linear)(x, everything), ours(x), rtol=1e-5, atol=1e-5)


def test_what_never_came_is_named(folder: Path, tensors: dict[str, Tensor]) -> None:
    intake = Intake(ServedArtifact.open(folder), [LAYER])
    intake.put(LAYER, "weight_packed", tensors[f"{LAYER}.weight_packed"])
    with pytest.raises(CheckpointError, match=rf"^{LAYER}\.weight_scale: missing from the checkpoint"):
        intake.expect_all()


def test_what_is_not_the_artifact_s_is_refused(folder: Path, tensors: dict[str, Tensor]) -> None:
    intake = Intake(ServedArtifact.open(folder), [LAYER])
    with pytest.raises(CheckpointError, match=rf"^{LAYER}: unexpected weight: expected weight_packed, "):
        intake.put(LAYER, "weight", torch.zeros(2))
    with pytest.raises(CheckpointError, match=rf"^{LAYER}\.weight_scale: its content is not what ledger.json says"):
        intake.put(LAYER, "weight_scale", tensors[f"{LAYER}.weight_scale"] * 2)


@pytest.mark.parametrize(
    "file", ["compensation/adapter_model.safetensors", "residual/residual.safetensors", "ledger.json"]
)
def test_a_file_that_is_gone_is_named(folder: Path, tensors: dict[str, Tensor], tmp_path: Path, file: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / file).unlink()
    with pytest.raises(CounterweightError, match=file.replace(".", r"\.")):
        filled(ServedArtifact.open(tmp_path / "copy"), tensors, LAYER).take(LAYER)


def test_a_ledger_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    ledger = tmp_path / "copy" / "ledger.json"
    ledger.write_text(ledger.read_text().replace('"bits": 3', '"bits": 2', 1))
    with pytest.raises(CounterweightError, match="ledger"):
        ServedArtifact.open(tmp_path / "copy")


def test_serving_imports_nothing_of_the_service() -> None:
    program = (
        "import sys\nimport counterweight.pipeline.serving.intake, counterweight.pipeline.serving.served\n"
        "import counterweight.pipeline.serving.shards, counterweight.pipeline.serving.vllm.plugin\n"
        "print([name for name in ('ray', 'boto3', 'cronsim', 'datasets', 'vllm', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert ran.stdout.strip() == "[]"
