"""DeepSeek-V3: what no other family has. Its logits, transforms and jobs are compared where those of all families are."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from counterweight.workers.errors import CheckpointError, UnsupportedModelError
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.families import families, family_of
from counterweight.workers.transforms.rotation import rotate_block
from counterweight.workers.transforms.smoothing import fold, producer_rows
from tests.models import (
    BASE,
    CASES,
    DEEPSEEK,
    EMBEDDING,
    LM_HEAD,
    NORM,
    YARN_MLA_ROPE,
    build,
    checkpoint,
    config_of,
    read_config,
    read_tensors,
    token_ids,
)
from tests.patience import MAX_CPU, cpu_seconds

CPU = torch.device("cpu")
BIAS = "mlp.gate.e_score_correction_bias"
SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
FAMILY = family_of("deepseek_v3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, BlockBuilder, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("deepseek_v3")
    model = checkpoint("deepseek_v3", directory)
    return model, BlockBuilder(read_config(directory)), read_tensors(directory)


Source = tuple[PreTrainedModel, BlockBuilder, dict[str, Tensor]]


def parameters_of(builder: BlockBuilder, tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: part.of(tensors[part.source]) for name, part in builder.layout.sources(index, tensors).items()}


def logits(builder: BlockBuilder, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    hidden = builder.embedding(tensors[EMBEDDING], CPU, dtype)(token_ids(2, 32))
    for index in range(builder.blocks):
        hidden = builder.block(index, parameters_of(builder, tensors, index), CPU, dtype).run(hidden)
    found: Tensor = builder.head({NORM: tensors[NORM], LM_HEAD: tensors[LM_HEAD]}, CPU, dtype)(hidden)
    return found


def test_linears_are_grouped_by_what_they_read(source: Source) -> None:
    _, builder, _ = source
    dense, sparse = builder.layout.block_linears(0), builder.layout.block_linears(1)
    attention = (
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.q_b_proj",),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
    )
    assert dense == (*attention, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    assert sparse[:6] == (*attention, SHARED, ("mlp.shared_experts.down_proj",))
    assert len(sparse) == 6 + 2 * 8
    full = BlockBuilder({**BASE, **CASES["deepseek_v3-full-queries"].config, "model_type": "deepseek_v3"})
    assert full.layout.block_linears(0)[:3] == (
        ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
    )


def test_shared_experts_see_every_token_and_routed_ones_their_share(source: Source) -> None:
    layout = source[1].layout
    assert layout.active_share(SHARED[0]) == 1.0
    assert layout.active_share("mlp.experts.7.up_proj") == 3 / 8


def test_the_correction_bias_decides_which_experts_run(source: Source) -> None:
    model, builder, tensors = source
    with torch.no_grad():
        expected = model(token_ids(2, 32)).logits
    torch.testing.assert_close(logits(builder, tensors), expected, rtol=0, atol=1e-5)
    without = {name: torch.zeros_like(tensor) if name.endswith(BIAS) else tensor for name, tensor in tensors.items()}
    assert (logits(builder, without) - expected).abs().max() > 1e-2


def test_groups_decide_which_experts_run() -> None:
    with torch.no_grad():
        difference = (
            build("deepseek_v3")(token_ids(2, 32)).logits - build("deepseek_v3", topk_group=4)(token_ids(2, 32)).logits
        )
    assert difference.abs().max() > 1e-2


def test_the_correction_bias_stays_in_float32(source: Source) -> None:
    _, builder, tensors = source
    parameters = parameters_of(builder, tensors, 1)
    layer = builder.block(1, parameters, CPU, torch.bfloat16).layer
    state = layer.state_dict()
    assert torch.equal(state[BIAS], parameters[BIAS])
    assert state[BIAS].dtype == torch.float32
    assert {tensor.dtype for name, tensor in state.items() if name != BIAS} == {torch.bfloat16}
    assert parameters[BIAS].bfloat16().float().ne(parameters[BIAS]).any()


def test_a_block_without_its_correction_bias_is_refused(source: Source) -> None:
    _, builder, tensors = source
    parameters = parameters_of(builder, tensors, 1)
    del parameters[BIAS]
    with pytest.raises(CheckpointError, match=rf"missing \['{BIAS}'\]"):
        builder.block(1, parameters, CPU, torch.float32)


def test_values_are_the_last_rows_of_each_head(source: Source) -> None:
    """A rotation of heads touches 16 of the 28 rows of each of 4 heads, and nothing of the keys."""
    _, builder, tensors = source
    before = parameters_of(builder, tensors, 1)
    only = Rotation(residual=False, online_down=False, heads=True)
    after, online = rotate_block("deepseek_v3", before, only, heads=4, key_value_heads=4)
    assert not online
    changed = (after["self_attn.kv_b_proj.weight"] != before["self_attn.kv_b_proj.weight"]).any(dim=1)
    assert changed.tolist() == ([False] * 12 + [True] * 16) * 4
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
    }


@pytest.mark.parametrize("index", [0, 1])
def test_scales_find_a_place_before_every_input_but_that_of_the_router(index: int, source: Source) -> None:
    _, builder, tensors = source
    parameters = parameters_of(builder, tensors, index)
    places = {group: producer_rows(FAMILY, group, parameters, 4) for group in builder.layout.block_linears(index)}
    values = [28 * head + row for head in range(4) for row in range(12, 28)]
    assert places["self_attn.o_proj",] == ("self_attn.kv_b_proj.weight", values)
    assert places["self_attn.q_b_proj",] == ("self_attn.q_a_layernorm.weight", slice(None))
    assert places["self_attn.kv_b_proj",] == ("self_attn.kv_a_layernorm.weight", slice(None))
    homeless = {group[0] for group, place in places.items() if place is None}
    assert homeless == (set() if index == 0 else {SHARED[0], *(f"mlp.experts.{n}.gate_proj" for n in range(8))})
    draw = torch.Generator().manual_seed(index)
    scales = {
        group: torch.rand(parameters[f"{group[0]}.weight"].shape[1], generator=draw).double() * 3 + 0.5
        for group, place in places.items()
        if place is not None
    }
    folded = fold(FAMILY, scales, parameters, heads=4)
    hidden = torch.randn(2, 16, 64, generator=draw)
    expected, found = (builder.block(index, part, CPU, torch.float32).run(hidden) for part in (parameters, folded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (folded["self_attn.o_proj.weight"] - parameters["self_attn.o_proj.weight"]).abs().max() > 0.1


def test_layers_for_multi_token_prediction_are_those_behind_the_last(source: Source) -> None:
    layout = source[1].layout
    assert (layout.blocks, layout.prediction_layers) == (3, 1)
    further = {
        f"model.layers.{n}.eh_proj.weight": layout.predicts_further(f"model.layers.{n}.eh_proj.weight")
        for n in range(5)
    }
    assert [name for name, yes in further.items() if yes] == ["model.layers.3.eh_proj.weight"]
    assert not layout.predicts_further("model.layers.03.eh_proj.weight")
    assert not layout.predicts_further("lm_head.weight")


HOSTILE: list[dict[str, Any]] = [
    {"n_routed_experts": 1 << 20},
    {"n_routed_experts": 0},
    {"n_routed_experts": 7},
    {"num_local_experts": 1 << 20},
    {"n_routed_experts": None},
    {"n_shared_experts": 0},
    {"n_shared_experts": 1 << 30},
    {"n_group": 0},
    {"n_group": 3},
    {"n_group": 8},
    {"n_group": None},
    {"topk_group": 5},
    {"topk_group": 0},
    {"topk_group": None},
    {"topk_group": 1},
    {"num_experts_per_tok": 9},
    {"num_experts_per_tok": None},
    {"q_lora_rank": 0},
    {"q_lora_rank": -1},
    {"q_lora_rank": "x"},
    {"q_lora_rank": 1 << 40},
    {"kv_lora_rank": 0},
    {"kv_lora_rank": None},
    {"qk_rope_head_dim": 7},
    {"qk_rope_head_dim": 0},
    {"qk_rope_head_dim": None},
    {"qk_nope_head_dim": -12},
    {"qk_nope_head_dim": 1 << 40},
    {"v_head_dim": None},
    {"v_head_dim": 0},
    {"head_dim": 10},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": None},
    {"num_attention_heads": 8},
    {"first_k_dense_replace": -5},
    {"first_k_dense_replace": "x"},
    {"first_k_dense_replace": None},
    {"num_nextn_predict_layers": -1},
    {"num_nextn_predict_layers": 1 << 30},
    {"num_nextn_predict_layers": None},
    {"num_mtp_layers": -1},
    {"routed_scaling_factor": "x"},
    {"norm_topk_prob": "x"},
    {"rope_interleave": "x"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {**YARN_MLA_ROPE, "mscale_all_dim": "x"}},
    {"rope_scaling": {**YARN_MLA_ROPE, "factor": -1}},
    {"moe_intermediate_size": 1 << 30},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_hostile_config_is_refused_or_harmless(change: dict[str, Any]) -> None:
    def refused_or_harmless() -> None:
        with suppress(CheckpointError, UnsupportedModelError):
            builder = BlockBuilder({**BASE, **DEEPSEEK, "model_type": "deepseek_v3", **change})
            expected = builder.layout.expected([])
            found = logits(builder, {name: torch.zeros(shape) for name, shape in expected.items()})
            assert found.shape == (2, 32, builder.vocabulary)

    assert cpu_seconds(refused_or_harmless, below=MAX_CPU) < MAX_CPU


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_local_experts": 1 << 20}, r"n_routed_experts: 1048576: expected an integer from 1 to 1024"),
        ({"n_group": 3}, r"n_group: 3: expected a divisor of n_routed_experts, 8"),
        ({"n_group": 8}, r"n_group: 8: .* 2 or more in a group"),
        ({"topk_group": 1}, r"topk_group: 1: expected at most n_group, 4, with num_experts_per_tok, 3"),
        ({"topk_group": None}, r"topk_group: None: expected an integer"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads: 2: expected 4, as num_attention_heads"),
        ({"num_experts_per_tok": None}, r"num_experts_per_tok: None: expected an integer"),
        ({"head_dim": 10}, r"head_dim 10 to be the same"),
        ({"num_nextn_predict_layers": -1}, r"num_nextn_predict_layers: -1: expected an integer from 0 to 1024"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, Any], problem: str) -> None:
    config = {**BASE, **DEEPSEEK, "model_type": "deepseek_v3", **change}
    if "num_local_experts" in change:
        del config["n_routed_experts"]
    with pytest.raises(CheckpointError, match=problem):
        BlockBuilder(config)


@pytest.mark.parametrize("name", families())
def test_key_value_heads_may_be_left_out(name: str) -> None:
    """Where transformers has them default to the heads, nothing here asks for more."""
    with suppress(CheckpointError):
        BlockBuilder(config_of(name, num_key_value_heads=None))
