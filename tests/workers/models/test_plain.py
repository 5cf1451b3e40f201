"""The layout that a config alone gives is the one that transformers builds; of what is not usual there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.plain import plain_layout
from tests.models import BASE, DEEPSEEK, LLAMA3_ROPE, MOE, YARN_MLA_ROPE

HEAD = "lm_head.weight"
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 32}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "deepseek": ("deepseek_v3", DEEPSEEK),
    "deepseek, all sparse": ("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 0}),
    "deepseek, all dense": ("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 3}),
    "deepseek with YaRN": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": YARN_MLA_ROPE}),
}


def config(family: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers writes it, with the sizes that it leaves out where they are defaults."""
    asked = {**BASE, **changes}
    made = CONFIG_MAPPING[family](**asked)
    return {**json.loads(made.to_json_string()), **{field: asked[field] for field in BASE if field.startswith("num_")}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stored", [(), (HEAD,)], ids=["headless", "with a head"])
def test_it_is_what_transformers_builds(name: str, stored: tuple[str, ...]) -> None:
    described = config(*MODELS[name])
    found, built = plain_layout(described, stored), BlockBuilder(described, stored).layout
    assert found == built
    assert found is not None
    assert list(found.block_parameters(0)) == list(built.block_parameters(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2"},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_theta": -1.0},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": None},
        {"hidden_size": 66, "head_dim": None},
        {"head_dim": 15},
        {"vocab_size": 1 << 21},
        {"num_hidden_layers": 2000},
        {"sliding_window": 8},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"something": "new"},
        {"quantization_config": {}},
    ],
    ids=str,
)
def test_of_what_is_not_usual_it_says_nothing(changes: dict[str, Any]) -> None:
    usual = config("llama", {})
    assert plain_layout(usual, ()) is not None
    assert plain_layout({**usual, **changes}, ()) is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"num_experts_per_tok": 5}),
        ("mixtral", {"num_local_experts": 2000}),
        ("mixtral", {"sliding_window": 8}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("deepseek", {"n_group": 3}),
        ("deepseek", {"topk_group": 5}),
        ("deepseek", {"num_key_value_heads": 2}),
        ("deepseek", {"q_lora_rank": None}),
        ("deepseek", {"attention_bias": True}),
        ("deepseek", {"qk_rope_head_dim": 7}),
        ("deepseek with YaRN", {"rope_parameters": {"rope_type": "yarn", "factor": 0.5, "rope_theta": 1e4}}),
    ],
    ids=str,
)
def test_likewise_of_sparse_models(name: str, changes: dict[str, Any]) -> None:
    usual = config(*MODELS[name])
    assert plain_layout(usual, ()) is not None
    assert plain_layout({**usual, **changes}, ()) is None


def test_sizes_have_no_default() -> None:
    usual = config("llama", {})
    del usual["intermediate_size"]
    assert plain_layout(usual, ()) is None
