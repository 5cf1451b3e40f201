"""A family is one value: whoever has a file here passes through everything that asks about models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from counterweight import load_model
from counterweight.pipeline.cli import main
from counterweight.pipeline.model_source import open_model
from counterweight.workers.errors import CheckpointError, UnsupportedModelError
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.families import families, family_of
from tests.inprocess import local, run_job
from tests.models import CASES, YARN_ROPE, checkpoint, config_of, read_config, read_tensors
from tests.pipeline.tiny import job_of, run_local, write_job


def test_every_family_has_a_model_to_be_tried_with() -> None:
    assert {case.family for case in CASES.values()} == set(families())


def test_an_unknown_model_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"model_type: 'gpt2': expected one of deepseek_v2, deepseek_v3, .*, qwen3_moe"
    ):
        family_of("gpt2")


@pytest.mark.parametrize("name", families())
def test_every_linear_is_connected(name: str) -> None:
    """Each linear's input comes from a norm, the heads or the product in an MLP, and each norm that is named exists."""
    family, builder = family_of(name), BlockBuilder(config_of(name))
    for index in range(builder.blocks):
        parameters = builder.layout.block_parameters(index)
        weights = {parameter.removesuffix(".weight") for parameter, shape in parameters.items() if len(shape) == 2}
        normed = {module for module in weights if family.norm_before(module) is not None}
        assert {family.norm_before(module) for module in normed} == set(family.norms)
        assert all(f"{norm}.weight" in parameters for norm in family.norms)
        written = {module for module in weights if family.writes_residual(module)}
        assert normed | written == weights
        assert not normed & written
        assert (family.value in normed) == (family.output in weights)
        downs = {module for module in weights if family.is_down(module)}
        assert downs
        if family.up is not None:
            assert all(f"{module.rpartition('.')[0]}.{family.up}" in weights for module in downs)


@pytest.mark.parametrize("name", families())
def test_every_family_passes_from_plan_to_report(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_job(tmp_path, case=name, layers=2)
    residual, heads = family_of(name).obstacle is None, family_of(name).value_obstacle is None
    rotation = f"{{kind: rotation, residual: {residual}, heads: {heads}}}".lower()
    changes = [
        f"spec.recipe.transforms=[{rotation}, {{kind: smoothing, strength: 0.5}}]",
        "spec.recipe.activations={bits: 4}",
        "spec.recipe.compensation={kind: lrc, rank: {count: 4}}",
    ]
    assert main(["plan", str(manifest), *(argument for change in changes for argument in ("--set", change))]) == 0
    assert " does not fit " not in " ".join(capsys.readouterr().out.split())
    published = run_local(job_of(manifest, *changes))
    assert (local(published) / "report" / "report.html").stat().st_size > 1000
    model = load_model(published.uri, dtype=torch.float32)
    validated = published.document.compensated
    assert validated is not None
    assert perplexity(model, tmp_path / "validation.txt") == pytest.approx(validated.perplexity, rel=0.01)


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Path, *, length: int = 32) -> float:
    """Of a text of `tests.models.write_text`, in windows of `length` tokens."""
    ids = torch.tensor([int(word.removeprefix("w")) for word in text.read_text().split()]).view(-1, length)
    logits = model(ids).logits.float()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


def test_layers_for_multi_token_prediction_under_a_prefix_are_left_out(tmp_path: Path) -> None:
    checkpoint("qwen3_next", tmp_path)
    extra = {"mtp.fc.weight": torch.zeros(64, 128), "mtp.layers.0.mlp.gate.weight": torch.zeros(4, 64)}
    save_file({**read_tensors(tmp_path), **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_model(tmp_path.as_uri()).dropped == dict.fromkeys(
        extra, "of a layer for multi-token prediction, which is not run"
    )


def test_a_model_that_transformers_knows_by_another_name_has_that_name_in_its_artifact(tmp_path: Path) -> None:
    checkpoint("kimi_k2", tmp_path / "model", torch.bfloat16, num_hidden_layers=1)
    recipe = {"weights": {"bits": 4, "quantizer": {"kind": "rtn"}}, "compensation": {"kind": "none"}}
    assert read_config(tmp_path / "model")["model_type"] == "kimi_k2"
    assert read_config(local(run_job(tmp_path / "model", tmp_path / "job", recipe)))["model_type"] == "deepseek_v3"


PARTIAL = {"rope_parameters": {**YARN_ROPE, "partial_rotary_factor": 0.5}}


def test_a_rotary_embedding_of_half_a_head_is_refused_by_the_plan_where_attention_turns_whole_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_job(tmp_path, layers=1)
    config = {**read_config(tmp_path / "model"), **PARTIAL}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(manifest)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "turns 8 of the 16 channels of a head: expected 16 for llama" in line


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0: expected None"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc': expected 'greedy' or 'group_limited"),
        ("deepseek_v2", {"n_group": None}, "n_group: None: expected an integer"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size: None: expected an integer"),
        ("llama", {"layer_types": ["linear_attention"] * 2}, "'linear_attention': expected full_attention or sliding"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "linear_num_key_heads: 3: expected a divisor of linear_num_value"),
        ("glm4_moe", {"n_group": 4}, "n_group: 4: expected a divisor of n_routed_experts, 4, that leaves 2 or more"),
        ("glm4_moe", {"partial_rotary_factor": 2.0}, "turns 32 of the 16 channels of a head: expected at most 16"),
    ],
    ids=str,
)
def test_what_a_family_cannot_run_is_refused(name: str, change: dict[str, object], problem: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        BlockBuilder(config_of(name, **change))
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", [name for name in families() if family_of(name).obstacle is not None])
def test_what_cannot_be_rotated_is_refused_with_its_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_job(tmp_path, case=name, layers=2)
    assert main(["plan", str(manifest), "--set", "spec.recipe.transforms=[{kind: rotation}]"]) == 2
    assert f"rotation.residual: true: expected false for {name}" in capsys.readouterr().err
