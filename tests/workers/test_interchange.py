"""Names, formats and configs in other people's terms. That stock loaders agree: tests/stock."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from counterweight.kernels.formats import LowRank
from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.errors import CheckpointError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import (
    QUANT_METHOD,
    artifact_config,
    read_weight,
    refusal_of_weights,
    scale_dtype,
    source_config,
    weight_tensors,
)
from counterweight.workers.interchange.peft import (
    adapter_config,
    factor_names,
    factor_tensors,
    read_branch,
    refusal_of_adapter,
)
from counterweight.workers.models.families import families

DENSE = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2"
OTHER_EXPERT = "model.layers.1.block_sparse_moe.experts.0.w1"


def form(bits: int = 4, **changes: Any) -> ModuleFormat:
    plain = {"bits": bits, "group_size": 32, "symmetric": True, "activation_bits": None, "rank": 0}
    return ModuleFormat.model_validate({**plain, **changes})


def weight(*, symmetric: bool = True) -> UniformWeight:
    generator = torch.Generator().manual_seed(0)
    return UniformWeight(
        codes=torch.randint(-8, 8, (6, 64), generator=generator).to(torch.int8),
        scale=torch.rand(6, 2, generator=generator).bfloat16(),
        zero_point=None if symmetric else torch.randint(-8, 8, (6, 2), generator=generator).to(torch.int8),
        bits=4,
        group_size=32,
    )


BRANCH = LowRank(up=torch.ones(6, 2), down=torch.ones(2, 64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_comes_back(symmetric: bool) -> None:
    stored = weight_tensors(DENSE, weight(symmetric=symmetric))
    assert all(name.startswith(f"{DENSE}.weight_") for name in stored)
    found = read_weight(stored, DENSE, form(symmetric=symmetric))
    assert torch.equal(found.dequantize(), weight(symmetric=symmetric).dequantize())


@pytest.mark.parametrize(
    "wrong", [form(8), form(2), form(3), form(group_size=None), form(group_size=16), form(symmetric=False)], ids=str
)
def test_a_weight_of_another_format_is_refused(wrong: ModuleFormat) -> None:
    with pytest.raises(CheckpointError, match=rf"^{DENSE}: "):
        read_weight(weight_tensors(DENSE, weight()), DENSE, wrong)


def test_a_branch_comes_back_under_the_names_of_peft() -> None:
    stored = factor_tensors(DENSE, BRANCH)
    assert list(stored) == [f"base_model.model.{DENSE}.lora_A.weight", f"base_model.model.{DENSE}.lora_B.weight"]
    assert tuple(stored) == factor_names(DENSE, None)
    found = read_branch(stored, DENSE, form(rank=2), (6, 64))
    assert found is not None
    assert torch.equal(found.up, BRANCH.up)
    assert torch.equal(found.down, BRANCH.down)
    assert read_branch({}, DENSE, form(), (6, 64)) is None


@pytest.mark.parametrize(
    ("down", "up"),
    [(torch.ones(3, 64), torch.ones(6, 3)), (torch.ones(2, 64), torch.ones(6, 3)), (torch.ones(2), torch.ones(6, 2))],
)
def test_a_branch_of_another_rank_is_refused(down: torch.Tensor, up: torch.Tensor) -> None:
    stored = dict(zip(factor_names(DENSE, None), (down, up), strict=True))
    with pytest.raises(CheckpointError, match=f"{DENSE}: .*expected rank 2"):
        read_branch(stored, DENSE, form(rank=2), (6, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_factors_are_read_as_written_and_not_by_peft(bits: Literal[4, 8]) -> None:
    coded = LowRank(
        up=torch.full((6, 2), 3, dtype=torch.int8),
        down=torch.full((2, 64), -5, dtype=torch.int8),
        up_scale=torch.tensor([0.5, 0.25]),
        down_scale=torch.tensor([2.0, 1.0]),
        code_bits=bits,
    )
    tensors = factor_tensors(DENSE, coded)
    assert tuple(tensors) == factor_names(DENSE, bits)
    assert sum(8 * tensor.nbytes for tensor in tensors.values()) == coded.bits
    found = read_branch(tensors, DENSE, form(rank=2, factor_bits=bits), (6, 64))
    assert found is not None
    assert torch.equal(found.product(), coded.product())
    assert found.product()[0, 0] == 3 * 0.5 * -5 * 2.0 + 3 * 0.25 * -5 * 1.0
    assert found.bits == coded.bits
    formats = {DENSE: form(rank=2, factor_bits=bits)}
    assert adapter_config(formats, "x", families()["llama"])["peft_type"] == "COUNTERWEIGHT"
    wrong = {**tensors, factor_names(DENSE, bits)[2]: torch.ones(3)}
    with pytest.raises(CheckpointError, match="int8 codes and 2 steps"):
        read_branch(wrong, DENSE, formats[DENSE], (6, 64))


def test_packed_factors_of_another_size_are_refused() -> None:
    ones, steps = torch.ones(2, 64, dtype=torch.int8), torch.ones(2)
    coded = LowRank(up=ones.T.contiguous(), down=ones, up_scale=steps, down_scale=steps, code_bits=4)
    with pytest.raises(CheckpointError, match=f"{DENSE}: packed factors: .*72 codes fill 9"):
        read_branch(factor_tensors(DENSE, coded), DENSE, form(rank=2, factor_bits=4), (64, 72))


def test_online_transforms_are_said_in_the_words_of_compressed_tensors() -> None:
    from compressed_tensors.transform import TransformConfig
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    from counterweight.kernels.hadamard import hadamard_matrix

    online = {"size": 64, "seed": None, "inner": 1}
    formats = {
        DENSE: form(online=online),
        "model.layers.1.mlp.down_proj": form(online={**online, "size": 92}),  # 23 blocks of 4
        "model.layers.2.mlp.down_proj": form(online={**online, "size": 768}),  # 12 x 64: theirs is another matrix
        "model.layers.3.mlp.down_proj": form(online={**online, "inner": 4}),
    }
    config = artifact_config(SOURCE, formats, list(formats), families()["llama"])["quantization_config"]
    assert "online Hadamard" in config["reason"]
    found = TransformConfig.model_validate(config["transform_config"]).config_groups
    said = {scheme.head_dim: scheme.apply[0].targets for scheme in found.values()}
    assert said == {64: [DENSE], 4: ["model.layers.1.mlp.down_proj"]}
    for order in said:
        assert order is not None
        theirs = deterministic_hadamard_matrix(order, dtype=torch.float64) / order**0.5
        assert torch.allclose(theirs, hadamard_matrix(order))


def test_scales_of_experts_are_float32() -> None:
    assert scale_dtype(DENSE, torch.bfloat16) is torch.bfloat16
    assert scale_dtype("mlp.experts.0.gate_proj", torch.bfloat16) is torch.float32
    assert scale_dtype(EXPERT, torch.float16) is torch.float32
    assert scale_dtype("mlp.shared_expert.gate_proj", torch.float16) is torch.float16


@pytest.mark.parametrize(
    ("formats", "reason"),
    [
        ({DENSE: form(symmetric=False, activation_bits=8), EXPERT: form(), OTHER_EXPERT: form()}, None),
        ({DENSE: form()}, None),
        ({EXPERT: form(rank=4), OTHER_EXPERT: form()}, None),
        ({EXPERT: form(), OTHER_EXPERT: form(8)}, "more than one format"),
        ({EXPERT: form()}, "more than one format"),
        ({EXPERT: form(symmetric=False), OTHER_EXPERT: form(symmetric=False)}, "asymmetric"),
        ({EXPERT: form(activation_bits=8), OTHER_EXPERT: form(activation_bits=8)}, "quantized activations"),
    ],
)
def test_what_stock_transformers_cannot_represent(formats: dict[str, ModuleFormat], reason: str | None) -> None:
    found = refusal_of_weights(formats, [EXPERT, OTHER_EXPERT])
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("family", "branches", "reason"),
    [
        ("llama", [DENSE], None),
        ("mixtral", ["model.layers.0.self_attn.q_proj"], None),
        ("mixtral", [EXPERT], "branches on experts"),
        ("qwen3_moe", ["model.layers.0.self_attn.q_proj"], None),
        ("qwen3_moe", ["model.layers.0.mlp.experts.1.up_proj"], "branches on experts"),
        ("qwen3_moe", [DENSE], "takes them for experts"),
        ("deepseek_v3", ["model.layers.0.self_attn.kv_b_proj"], None),
        ("deepseek_v3", ["model.layers.1.mlp.shared_experts.up_proj"], "takes them for experts"),
    ],
)
def test_branches_that_are_not_for_peft(family: str, branches: list[str], reason: str | None) -> None:
    formats = {**dict.fromkeys(branches, form(rank=4)), OTHER_EXPERT: form()}
    found = refusal_of_adapter(formats, families()[family])
    config = adapter_config(formats, "tiny", families()[family])
    if reason is None:
        assert found is None
        assert config["peft_type"] == "LORA"
        assert config["target_modules"] == branches
    else:
        assert found is not None
        assert reason in found
        assert config["peft_type"] == "COUNTERWEIGHT"
        assert config["reason"] == found


SOURCE = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64}


def config_of(formats: dict[str, ModuleFormat], linears: list[str]) -> dict[str, Any]:
    return artifact_config(SOURCE, formats, linears, families()["mixtral"])


def test_a_refused_artifact_has_no_model_type_that_anybody_knows() -> None:
    config = config_of({EXPERT: form(symmetric=False)}, [EXPERT])
    assert config["model_type"] == "counterweight_mixtral"
    assert config["architectures"] == []
    assert config["quantization_config"]["quant_method"] == QUANT_METHOD
    assert "asymmetric" in config["quantization_config"]["reason"]
    assert config["hidden_size"] == 64


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_models_own_config_comes_back(symmetric: bool) -> None:
    plain = source_config(config_of({EXPERT: form(symmetric=symmetric)}, [EXPERT]))
    assert plain["model_type"] == "mixtral"
    assert "quantization_config" not in plain
    assert plain["hidden_size"] == 64


def test_the_source_config_is_left_alone() -> None:
    config_of({EXPERT: form()}, [EXPERT])
    assert SOURCE == {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64}


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": "x"}])
def test_a_config_that_is_not_ours_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="expected an artifact of Counterweight"):
        source_config({"model_type": "llama", **config})
