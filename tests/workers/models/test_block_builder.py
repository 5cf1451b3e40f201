"""A model run block by block is the model; names and shapes are exact; hostile configs are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from counterweight.workers.errors import CheckpointError, UnsupportedModelError
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.experts import GatedProduct, LinearExperts, SortedExperts
from counterweight.workers.models.families import families
from counterweight.workers.models.source import head_of
from tests.models import (
    BASE,
    CASES,
    LLAMA3_ROPE,
    LONG_ROPE,
    MOE,
    YARN_ROPE,
    build,
    checkpoint,
    read_config,
    read_tensors,
    save,
    save_fused,
    token_ids,
)
from tests.patience import MAX_CPU, cpu_seconds

CPU = torch.device("cpu")
DENSE_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def expert_groups(experts: int) -> tuple[tuple[str, ...], ...]:
    groups: list[tuple[str, ...]] = []
    for expert in range(experts):
        stem = f"mlp.experts.{expert}"
        groups += [(f"{stem}.gate_proj", f"{stem}.up_proj"), (f"{stem}.down_proj",)]
    return tuple(groups)


def filled(builder: BlockBuilder, tensors: Mapping[str, Tensor], index: int) -> Block:
    parameters = {name: part.of(tensors[part.source]) for name, part in builder.layout.sources(index, tensors).items()}
    return builder.block(index, parameters, CPU, torch.float32)


def logits_by_block(builder: BlockBuilder, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    names = builder.names
    hidden: Tensor = builder.embedding(tensors[names.embedding], CPU, torch.float32)(ids)
    for index in range(builder.blocks):
        hidden = filled(builder, tensors, index).run(hidden)
    logits: Tensor = builder.head(head_of(tensors, names), CPU, torch.float32)(hidden)
    return logits


def assert_is_the_model(model: PreTrainedModel, directory: Path) -> None:
    ids = token_ids(2, 32)
    tensors = read_tensors(directory)
    builder = BlockBuilder(read_config(directory), tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not builder.layout.is_beside(name)}
    assert builder.layout.expected(tensors) == shapes
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(logits_by_block(builder, tensors, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_block_by_block_is_the_whole_model(case: str, tmp_path: Path) -> None:
    assert_is_the_model(checkpoint(case, tmp_path), tmp_path)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_are_stored_fused(case: str, tmp_path: Path) -> None:
    model = build(case)
    assert_is_the_model(model, save_fused(model, tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("qwen2")
    save(model, tmp_path, dtype, shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_is_the_model(model, tmp_path)


def test_every_family_of_the_table_is_among_the_cases() -> None:
    assert {case.family for case in CASES.values()} == set(families())


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("phi3", {"sliding_window": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 64}),
        ("llama-rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("gpt_oss", {"sliding_window": 64}),
        ("gpt_oss", {"swiglu_limit": 7.0}),
        ("gpt_oss", {"swiglu_alpha": 1.0}),
        ("llama4_text", {"attention_chunk_size": 64}),
        ("llama4_text", {"no_rope_layer_interval": 3}),
        ("llama4_text", {"attn_temperature_tuning": False}),
        ("minimax_m2", {"rotary_dim": 16}),
        ("deepseek_v2", {"topk_method": "greedy"}),
    ],
)
def test_the_features_that_are_compared_do_something(case: str, changes: dict[str, Any]) -> None:
    """Without the feature the logits are others: the comparisons above cannot pass by leaving it out."""
    ids = token_ids(2, 32)
    with torch.no_grad():
        difference = build(case)(ids).logits - build(case, **changes)(ids).logits
    assert difference.abs().max() > 1e-3


def test_groups_are_the_linears_of_the_block() -> None:
    assert BlockBuilder({**BASE, "model_type": "llama"}).layout.block_linears(0) == DENSE_GROUPS
    assert BlockBuilder({**BASE, "model_type": "phi3"}).layout.block_linears(1) == (
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    )
    mixtral = BlockBuilder({**BASE, "model_type": "mixtral", "num_local_experts": 3})
    assert mixtral.layout.block_linears(0) == DENSE_GROUPS[:2] + expert_groups(3)


def test_a_dense_block_of_a_sparse_model() -> None:
    builder = BlockBuilder({**BASE, **MOE, "model_type": "qwen3_moe", "mlp_only_layers": [1]})
    assert builder.layout.block_linears(0) == DENSE_GROUPS[:2] + expert_groups(4)
    assert builder.layout.block_linears(1) == DENSE_GROUPS
    assert builder.layout.disk_name(1, "mlp.down_proj.weight") == "model.layers.1.mlp.down_proj.weight"


def test_names_on_disk_of_mixtral() -> None:
    builder = BlockBuilder({**BASE, "model_type": "mixtral", "num_local_experts": 12})
    names = {
        "mlp.experts.11.gate_proj.weight": "model.layers.1.block_sparse_moe.experts.11.w1.weight",
        "mlp.experts.1.up_proj.weight": "model.layers.1.block_sparse_moe.experts.1.w3.weight",
        "mlp.experts.0.down_proj.weight": "model.layers.1.block_sparse_moe.experts.0.w2.weight",
        "mlp.gate.weight": "model.layers.1.block_sparse_moe.gate.weight",
        "input_layernorm.weight": "model.layers.1.input_layernorm.weight",
    }
    assert {name: builder.layout.disk_name(1, name) for name in names} == names


def test_an_expert_without_tokens_is_not_run() -> None:
    experts = LinearExperts(3, 8, 4, GatedProduct(torch.nn.SiLU()))
    ran: list[int] = []
    for index in range(3):
        linear = experts.get_submodule(f"{index}.down_proj")
        linear.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        output = experts(torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.full((5, 2), 0.5))
    assert ran == [0, 2]
    assert output.shape == (5, 8)


def test_experts_that_are_given_their_inputs_are_run_on_the_tokens_that_they_see() -> None:
    experts = SortedExperts(3, 8, 4, GatedProduct(torch.nn.SiLU()))
    seen: dict[int, Tensor] = {}
    for index in range(3):
        linear = experts.get_submodule(f"{index}.up_proj")
        linear.register_forward_pre_hook(lambda _, given, index=index: seen.update({index: given[0]}))
    hidden = torch.randn(3, 5, 8)
    hidden[0, 1:4] = 0
    hidden[1] = 0
    with torch.no_grad():
        output = experts(hidden.flatten(0, 1)).view(3, 5, 8)
    assert torch.equal(seen[0], hidden[0, [0, 4]])
    assert torch.equal(seen[2], hidden[2])
    assert 1 not in seen
    with torch.no_grad():
        expected = [experts.run(index, hidden[index]) for index in range(3)]
    torch.testing.assert_close(output, torch.stack(expected))


def test_a_replica_shares_tensors_and_not_modules(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path)
    block = filled(BlockBuilder(read_config(tmp_path)), read_tensors(tmp_path), 0)
    copy = block.replica()
    assert copy.linear("mlp.down_proj") is not block.linear("mlp.down_proj")
    assert copy.linear("mlp.down_proj").weight.data_ptr() == block.linear("mlp.down_proj").weight.data_ptr()
    copy.replace("mlp.down_proj", torch.nn.Linear(96, 64, bias=False))
    hidden = torch.randn(1, 8, 64)
    assert not torch.equal(copy.run(hidden), block.run(hidden))


def test_missing_and_unexpected_parameters_are_refused(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path)
    builder, tensors = BlockBuilder(read_config(tmp_path)), read_tensors(tmp_path)
    parameters = {name: part.of(tensors[part.source]) for name, part in builder.layout.sources(0, tensors).items()}
    surplus = {**parameters, "mlp.down_proj.bias": torch.zeros(64)}
    with pytest.raises(CheckpointError, match=r"unexpected \['mlp.down_proj.bias'\]"):
        builder.block(0, surplus, CPU, torch.float32)
    del parameters["input_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"missing \['input_layernorm.weight'\]"):
        builder.block(0, parameters, CPU, torch.float32)


def test_the_config_that_was_given_stays_as_it_was() -> None:
    """transformers writes defaults into nested dictionaries; keys and artifacts are made from the config as it was."""
    config = {**BASE, "model_type": "llama", "rope_parameters": dict(LLAMA3_ROPE)}
    del config["rope_parameters"]["original_max_position_embeddings"]
    before = copy.deepcopy(config)
    BlockBuilder(config)
    assert config == before


@pytest.mark.parametrize("model_type", ["gpt2", "LLAMA", "", None, 7, ["llama"], {"a": 1}])
def test_an_unknown_model_type_is_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        BlockBuilder({**BASE, "model_type": model_type})
    assert repr(model_type) in str(caught.value)
    assert all(known in str(caught.value) for known in families())


HOSTILE: list[dict[str, Any]] = [
    {"hidden_size": -1},
    {"hidden_size": 0},
    {"hidden_size": "64"},
    {"hidden_size": 64.0},
    {"hidden_size": True},
    {"hidden_size": 10**12},
    {"hidden_size": 63},
    {"hidden_size": None},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": "2"},
    {"num_attention_heads": 3},
    {"num_attention_heads": 5, "num_key_value_heads": 1},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 8},
    {"head_dim": 15},
    {"head_dim": -16},
    {"vocab_size": -5},
    {"vocab_size": "128"},
    {"vocab_size": None},
    {"pad_token_id": 10**6},
    {"pad_token_id": "zero"},
    {"hidden_act": "rm -rf"},
    {"hidden_act": 5},
    {"rms_norm_eps": "small"},
    {"tie_word_embeddings": "maybe"},
    {"rope_parameters": {"rope_type": "unheard-of", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"rope_parameters": "x"},
    {"rope_scaling": [1, 2]},
    {"max_position_embeddings": -1},
    {"max_position_embeddings": "long"},
    {"attention_bias": "x"},
    {"dtype": "float7"},
    {"torch_dtype": 5},
    {"layer_types": ["full_attention"]},
    {"layer_types": ["nonsense", "nonsense"]},
    {"layer_types": "x"},
    {"layer_types": ["chunked_attention", "full_attention"]},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": [["full_attention"], 3]},
    {"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]},
    {"head_dim": 1},
    {"head_dim": 3},
    {"attn_implementation": "flash_attention_17"},
    {"architectures": 5},
    {"id2label": 5},
    {"sliding_window": -3},
    {"sliding_window": 0},
    {"sliding_window": "x"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.03}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1e300}},
    {"rope_parameters": {**YARN_ROPE, "original_max_position_embeddings": 0}},
    {"rope_parameters": {**LONG_ROPE, "long_factor": [1.0]}},
    {"rope_parameters": {**LONG_ROPE, "short_factor": "abcdefgh", "original_max_position_embeddings": 64}},
    {"final_logit_softcapping": "x"},
    {"query_pre_attn_scalar": 0},
    {"query_pre_attn_scalar": -4},
    {"is_encoder_decoder": True},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"return_dict": False},
    {"use_cache": "x"},
    {"pruned_heads": {"0": [0]}},
    {"chunk_size_feed_forward": "x"},
    {"model_type": "llama", "text_config": {"hidden_size": -1}},
    {"use_bidirectional_attention": True},
    {"bos_token_id": "x"},
    {"name_or_path": "/etc/passwd"},
    {"torchscript": True},
    {"tp_plan": {"layers.*": "x"}},
    {"_attn_implementation": "nonsense"},
    {"attribute_map": {"hidden_size": "vocab_size"}},
    {"base_model_tp_plan": 5},
    {"__class__": 5},
    {"to_dict": 5},
    {"from_dict": "x"},
    {"num_hidden_layers": 2, "hidden_size ": 5},
]
HOSTILE_GPT_OSS: list[dict[str, Any]] = [
    {"num_local_experts": 0},
    {"num_local_experts": 10**6},
    {"num_local_experts": "4"},
    {"num_experts": -7},
    {"num_experts_per_tok": 5},
    {"intermediate_size": 0},
    {"sliding_window": None},
    {"swiglu_limit": "x"},
    {"swiglu_limit": -1.0},
    {"swiglu_limit": None},
    {"swiglu_alpha": 10**400},
    {"swiglu_alpha": 1e300},
    {"attention_bias": False},
    {"rope_parameters": None},
]
HOSTILE_EXPERTS: list[dict[str, Any]] = [
    {"num_experts": -1},
    {"num_experts": "4"},
    {"num_experts": 1 << 20},
    {"num_experts_per_tok": 5},
    {"num_experts_per_tok": 0},
    {"moe_intermediate_size": 0},
    {"decoder_sparse_step": 0},
    {"decoder_sparse_step": "x"},
    {"mlp_only_layers": 5},
    {"mlp_only_layers": "x"},
]


def walk(config: Mapping[str, Any]) -> None:
    """What opening and running a model asks of a config."""
    builder = BlockBuilder(config)
    expected = builder.layout.expected([])
    tensors = {name: torch.zeros(shape) for name, shape in expected.items()}
    logits = logits_by_block(builder, tensors, token_ids(1, 32))
    assert logits.shape == (1, 32, builder.vocabulary)


def assert_refused_or_works(config: Mapping[str, Any]) -> None:
    def refused_or_works() -> None:
        with suppress(CheckpointError, UnsupportedModelError):
            walk(config)

    assert cpu_seconds(refused_or_works, below=MAX_CPU) < MAX_CPU


@pytest.mark.parametrize("change", HOSTILE, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_hostile_config_is_refused_or_harmless(family: str, change: dict[str, Any]) -> None:
    assert_refused_or_works({**BASE, "model_type": family, **change})


@pytest.mark.parametrize("change", HOSTILE_EXPERTS, ids=str)
def test_a_hostile_config_of_experts_is_refused_or_harmless(change: dict[str, Any]) -> None:
    assert_refused_or_works({**BASE, **MOE, "model_type": "qwen3_moe", **change})


@pytest.mark.parametrize("change", HOSTILE_GPT_OSS, ids=str)
def test_a_hostile_config_of_gpt_oss_is_refused_or_harmless(change: dict[str, Any]) -> None:
    assert_refused_or_works({**BASE, **CASES["gpt_oss"].config, "model_type": "gpt_oss", **change})
