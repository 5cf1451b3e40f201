"""gpt-oss: parts of fused tensors, blocks, and artifacts against a reference that shares no code with what made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from counterweight import load_model
from counterweight.pipeline.artifact import Published
from counterweight.pipeline.model_source import open_model
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.errors import CheckpointError
from counterweight.workers.ledger import Ledger
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.layout import Slice
from counterweight.workers.models.source import whole
from counterweight.workers.storage import open_store
from tests.inprocess import local, run_job
from tests.models import EMBEDDING, build, checkpoint, read_config, read_tensors, save_mxfp4, token_ids

CPU = torch.device("cpu")
GPTQ = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}}, "compensation": {"kind": "none"}}
LRC = {**GPTQ, "activations": {"bits": 8}, "compensation": {"kind": "lrc", "rank": {"count": 4}}}


def test_parts_of_fused_tensors_are_views_of_them(tmp_path: Path) -> None:
    checkpoint("gpt_oss", tmp_path)
    tensors = read_tensors(tmp_path)
    sources = BlockBuilder(read_config(tmp_path)).layout.sources(1, tensors)
    fused, biases = (tensors[f"model.layers.1.mlp.experts.gate_up_proj{end}"] for end in ("", "_bias"))
    down = tensors["model.layers.1.mlp.experts.down_proj"]
    expected = {
        "3.gate_proj.weight": fused[3, :, 0::2].T,
        "3.gate_proj.bias": biases[3, 0::2],
        "3.up_proj.weight": fused[3, :, 1::2].T,
        "3.up_proj.bias": biases[3, 1::2],
        "2.down_proj.weight": down[2].T,
        "2.down_proj.bias": tensors["model.layers.1.mlp.experts.down_proj_bias"][2],
    }
    for name, values in expected.items():
        place = sources[f"mlp.experts.{name}"]
        part = place.of(tensors[place.source])
        assert torch.equal(part, values)
        assert part.untyped_storage().data_ptr() == tensors[place.source].untyped_storage().data_ptr()


def test_a_part_of_two_halves_is_what_it_was() -> None:
    fused = torch.arange(24).reshape(2, 6, 2)
    assert torch.equal(Slice("x", 1, (3, 6, 1)).of(fused), fused[1, 3:])


def test_every_block_is_that_of_transformers(tmp_path: Path) -> None:
    model = checkpoint("gpt_oss", tmp_path)
    builder, tensors = BlockBuilder(read_config(tmp_path)), read_tensors(tmp_path)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    with torch.no_grad():
        model(token_ids(2, 32))
    for index, (given, output) in enumerate(seen):
        sources = builder.layout.sources(index, tensors)
        parameters = {name: part.of(tensors[part.source]) for name, part in sources.items()}
        block = builder.block(index, parameters, CPU, torch.float32)
        torch.testing.assert_close(block.run(given), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias", "q_proj.bias"])
def test_what_is_compared_does_something(part: str) -> None:
    """Without this parameter the logits are others: comparisons cannot pass by leaving it out."""
    model, ids = build("gpt_oss"), token_ids(2, 32)
    with torch.no_grad():
        before = model(ids).logits
        for name, parameter in model.named_parameters():
            if name.endswith(part):
                parameter.fill_(-1e9 if part == "sinks" else 0.0)  # a sink of no weight
        assert (model(ids).logits - before).abs().max() > 1e-3


def test_clamps_act_on_many_values(tmp_path: Path) -> None:
    """Of gate from above, of up on both sides."""
    model = checkpoint("gpt_oss", tmp_path)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    gate_up = x @ experts.gate_up_proj[0] + experts.gate_up_proj_bias[0]
    gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    for outside in (gate > experts.limit, up > experts.limit, up < -experts.limit):
        assert 0.05 < float(outside.float().mean()) < 0.95


def compressed(model: Path, output: Path, recipe: dict[str, Any]) -> Published:
    return run_job(model, output, recipe, validation={})


@pytest.mark.parametrize("recipe", [GPTQ, LRC], ids=["W4A16 gptq", "W4A8 lrc"])
def test_an_artifact_has_the_logits_of_the_reference(recipe: dict[str, Any], tmp_path: Path) -> None:
    original = checkpoint("gpt_oss", tmp_path / "model")
    published = compressed(tmp_path / "model", tmp_path / "job", recipe)
    ids = token_ids(2, 32)
    with torch.no_grad():
        found = load_model(published.uri, dtype=torch.float32)(ids).logits
        expected = reference(original, local(published), quantized_inputs="activations" in recipe)(ids).logits
    differences = (found - expected).abs() / expected.std()
    # A value at a tie may round to the next of 255 codes: then a token differs, by far less than a missing part makes.
    assert float(differences.median()) < 1e-4
    assert float(differences.max()) < (0.05 if "activations" in recipe else 1e-4)
    assert published.document.compensated is None or published.document.compensated.kl < 0.5


def test_what_is_kept_of_the_experts_comes_back_exactly(tmp_path: Path) -> None:
    original = checkpoint("gpt_oss", tmp_path / "model")
    keep = ["lm_head", "*.mlp.experts.*", "*.self_attn.[qkv]_proj", "*.layers.0.self_attn.o_proj"]
    recipe = {**GPTQ, "weights": {"bits": 8}, "keep": keep}
    published = compressed(tmp_path / "model", tmp_path / "job", recipe)
    stored = read_tensors(local(published))
    fused = original.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(stored["model.layers.0.mlp.experts.2.up_proj.weight"], fused[2, :, 1::2].T)
    ids = token_ids(2, 32)
    with torch.no_grad():
        found, expected = load_model(published.uri, dtype=torch.float32)(ids).logits, original(ids).logits
    assert 0 < (found - expected).abs().max() < 0.05 * expected.std()
    refused_by_transformers(published)


def test_rotated_and_smoothed_artifacts_load(tmp_path: Path) -> None:
    original = checkpoint("gpt_oss", tmp_path / "model", num_key_value_heads=4)
    transforms = [{"kind": "rotation", "online_output": True}, {"kind": "smoothing", "strength": 0.5}]
    recipe = {**GPTQ, "weights": {"bits": 8}, "transforms": transforms}
    published = compressed(tmp_path / "model", tmp_path / "job", recipe)
    ids = token_ids(2, 32)
    with torch.no_grad():
        found, expected = load_model(published.uri, dtype=torch.float32)(ids).logits, original(ids).logits
    # A token whose router is nearly undecided may go to another expert, so not every logit is near.
    assert (found - expected).abs().median() < 0.05 * expected.std()


def test_stock_transformers_refuses_the_artifact(tmp_path: Path) -> None:
    checkpoint("gpt_oss", tmp_path / "model", torch.bfloat16)
    published = compressed(tmp_path / "model", tmp_path / "job", GPTQ)
    config = read_config(local(published))
    assert config["model_type"] == "counterweight_gpt_oss"
    assert "experts of gpt-oss apart" in config["quantization_config"]["reason"]
    refused_by_transformers(published)


def refused_by_transformers(published: Published) -> None:
    with pytest.raises((ValueError, KeyError), match="counterweight"):
        AutoModelForCausalLM.from_pretrained(local(published))


def test_a_source_in_mxfp4_is_the_model_of_the_decoded_weights(tmp_path: Path) -> None:
    """As transformers decodes them; every tensor is accounted for."""
    model = build("gpt_oss")
    save_mxfp4(model, tmp_path / "model")
    opened = Checkpoint.open(open_store((tmp_path / "model").as_uri()))
    read = whole(opened, BlockBuilder(opened.config), CPU, torch.float32)
    ids = token_ids(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    published = run_job(tmp_path / "model", tmp_path / "job", {**GPTQ, "weights": {"bits": 8}}, validation={})
    assert published.document.compensated is not None
    assert published.document.compensated.kl < 0.02
    ledger = Ledger.model_validate_json((local(published) / "ledger.json").read_text())
    fates = {entry.source: entry for entry in ledger.entries}
    assert read_tensors(tmp_path / "model").keys() <= fates.keys()
    name = "model.layers.1.mlp.experts.down_proj"
    assert fates[name].fate == "quantized"
    assert fates[f"{name}_blocks"].reason == f"codes of {name}, decoded with it"
    assert fates[f"{name}_scales"].reason == f"scales of {name}, decoded with it"


def test_experts_in_mxfp4_without_a_config_that_says_so_are_refused(tmp_path: Path) -> None:
    save_mxfp4(build("gpt_oss"), tmp_path)
    config = {name: value for name, value in read_config(tmp_path).items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.0\.down_proj\.weight': missing"):
        open_model(tmp_path.as_uri())


@dataclass(frozen=True)
class Artifact:
    """The files of an artifact, read with safetensors alone."""

    tensors: dict[str, Tensor]
    factors: dict[str, Tensor]

    @classmethod
    def of(cls, root: Path) -> Artifact:
        adapter = root / "compensation" / "adapter_model.safetensors"
        return cls(read_tensors(root), load_file(adapter) if adapter.exists() else {})

    def linear(self, name: str, quantized_inputs: bool) -> Reference:
        words, scale = self.tensors[f"{name}.weight_packed"], self.tensors[f"{name}.weight_scale"]
        codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1) - 8
        weight = codes * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        down, up = (self.factors.get(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
        return Reference(weight, self.tensors[f"{name}.bias"], down, up, quantized_inputs)


class Reference(nn.Module):
    """A compressed linear by its definition."""

    def __init__(
        self, weight: Tensor, bias: Tensor, down: Tensor | None, up: Tensor | None, quantized_inputs: bool
    ) -> None:
        super().__init__()
        self.stored, self.bias, self.down, self.up, self.quantized_inputs = weight, bias, down, up, quantized_inputs

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if self.quantized_inputs:
            step = x.abs().amax(-1, keepdim=True) / 127.5
            seen = (x / step).round().clamp(-128, 127) * step
        y = seen @ self.stored.T + self.bias
        return y if self.down is None or self.up is None else y + x @ self.down.T @ self.up.T


class ReferenceExperts(nn.Module):
    """Experts one token at a time, by the formula of the model card's code."""

    def __init__(self, artifact: Artifact, prefix: str, experts: int, limit: float, quantized_inputs: bool) -> None:
        super().__init__()
        self.limit = limit
        self.parts = [
            [artifact.linear(f"{prefix}.{index}.{part}_proj", quantized_inputs) for part in ("gate", "up", "down")]
            for index in range(experts)
        ]

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token in range(len(hidden)):
            total = torch.zeros(hidden.shape[1])
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                gate, up, down = self.parts[expert]
                x = hidden[token]
                opened = torch.minimum(gate(x), torch.tensor(self.limit))
                linear = functional.hardtanh(up(x), -self.limit, self.limit)
                total += weight * down((linear + 1) * opened / (1 + torch.exp(-1.702 * opened)))
            rows.append(total)
        return torch.stack(rows)


def reference(original: PreTrainedModel, root: Path, *, quantized_inputs: bool) -> PreTrainedModel:
    """transformers' model with every linear of the artifact in its place; the rest as the artifact has it."""
    artifact = Artifact.of(root)
    assert torch.equal(original.model.embed_tokens.weight, artifact.tensors[EMBEDDING])
    for index, layer in enumerate(original.model.layers):
        prefix = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, artifact.linear(f"{prefix}.self_attn.{name}", quantized_inputs))
        old = layer.mlp.experts
        layer.mlp.experts = ReferenceExperts(
            artifact, f"{prefix}.mlp.experts", old.num_experts, old.limit, quantized_inputs
        )
    return original
