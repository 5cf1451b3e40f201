"""A block's task without files: statistics, solves, errors, and the block as it will be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterweight.kernels.linear import CompensatedLinear
from counterweight.workers.block import CompressedLinear, compress, install
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.errors import RequestError
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.parallel import OrderedPool, Overlapped, Shards, SideBySide
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.tasks.records import ModuleReport
from tests.models import CASES, build

CPU = torch.device("cpu")
RTN = {"kind": "rtn"}


def block_of(case: str, *, index: int = 0, **changes: Any) -> Block:
    """Block `index` of a tiny model, filled."""
    model = build(case, **changes)
    config = {**model.config.to_dict(), "model_type": CASES[case].family}
    builder = BlockBuilder(config)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    parameters = {name: part.of(tensors[part.source]) for name, part in builder.layout.sources(index, tensors).items()}
    return builder.block(index, parameters, CPU, torch.float32)


def shards(count: int = 4, *, sequences: int = 2, length: int = 16, width: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(sequences, length, width, generator=generator) for _ in range(count)]


def loaders(hidden: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    return [lambda shard=shard: shard for shard in hidden]


def calibrated(
    block: Block, hidden: Sequence[Tensor], threads: int = 1, shards: Shards | None = None
) -> tuple[dict[SharedInputGroup, InputStatistics], list[Tensor]]:
    pool = OrderedPool(threads)
    try:
        sums = RunningStatistics(block, dict.fromkeys(block.groups, Gathering()))
        outputs = run_shards(block, loaders(hidden), lambda output: output, sums, shards or SideBySide(pool))
        return sums.result(), outputs
    finally:
        pool.close()
        if shards is not None:
            shards.close()


def inputs_of(block: Block, hidden: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every linear's input [tokens, in] in float64, taken by hooks of our own."""
    replica = block.replica()
    seen: dict[str, list[Tensor]] = {}
    for name in (name for group in block.groups for name in group):

        def take(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            seen.setdefault(name, []).append(arguments[0].flatten(0, -2).double())

        replica.linear(name).register_forward_pre_hook(take)
    for shard in hidden:
        replica.run(shard)
    return {name: torch.cat(rows) for name, rows in seen.items()}


def module_recipe(**fields: Any) -> ModuleRecipe:
    plain = {"weights": {"bits": 4, "quantizer": RTN}, "activations": None, "compensation": {"kind": "none"}}
    return ModuleRecipe.model_validate({**plain, **fields})


def compressed(
    block: Block,
    statistics: Mapping[SharedInputGroup, InputStatistics],
    recipes: Mapping[str, ModuleRecipe],
    threads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, CompressedLinear], dict[str, ModuleReport]]:
    pool = OrderedPool(threads)
    weights = {name: block.linear(name).weight.detach() for name in recipes}
    linears, reports = compress(
        weights,
        dict(statistics),
        recipes,
        scale_dtypes=dict.fromkeys(recipes, dtype),
        factor_dtypes={name: weight.dtype for name, weight in weights.items()},
        pool=pool,
    )
    pool.close()
    return linears, {report.name: report for report in reports}


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3-full-queries"])
def test_statistics_are_those_of_every_sibling(case: str) -> None:
    """One per distinct input: each linear of a group sees just the rows that were counted."""
    block, hidden = block_of(case), shards()
    statistics, _ = calibrated(block, hidden)
    seen = inputs_of(block, hidden)
    assert tuple(statistics) == block.groups
    for group, found in statistics.items():
        for name in group:
            x = seen[name]
            assert found.tokens == len(x)
            exact = x.T @ x
            assert (found.gram - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_neither_threads_nor_overlapping_change_a_bit(case: str) -> None:
    block, hidden = block_of(case), shards(7)
    statistics, outputs = calibrated(block, hidden)
    for threads, way in ((2, None), (3, None), (1, Overlapped())):
        other, others = calibrated(block, hidden, threads, way)
        for group, found in statistics.items():
            assert torch.equal(other[group].gram, found.gram)
            assert other[group].tokens == found.tokens
        assert all(torch.equal(one, two) for one, two in zip(outputs, others, strict=True))


def test_outputs_are_those_of_the_block_in_order() -> None:
    block, hidden = block_of("llama"), shards()
    _, outputs = calibrated(block, hidden, threads=2)
    assert all(torch.equal(output, block.run(shard)) for output, shard in zip(outputs, hidden, strict=True))


def test_only_the_groups_that_are_asked_for_are_gathered() -> None:
    block = block_of("llama")
    asked = block.groups[1:2]
    sums = RunningStatistics(block, dict.fromkeys(asked, Gathering()))
    run_shards(block, loaders(shards(1)), lambda output: None, sums, SideBySide(OrderedPool(1)))
    assert tuple(sums.result()) == asked


def starved() -> Block:
    """A Mixtral block whose router never chooses expert 3, when the hidden states are positive."""
    block = block_of("mixtral")
    with torch.no_grad():
        block.linear("self_attn.o_proj").weight.zero_()  # the MLP sees the block's input, normed
        block.layer.get_parameter("post_attention_layernorm.weight").fill_(1.0)
        block.layer.get_parameter("mlp.gate.weight")[3] = -10.0
    return block


def test_an_expert_without_tokens_has_zeros_and_its_solve_says_so() -> None:
    block = starved()
    statistics, _ = calibrated(block, [shard.abs() + 0.1 for shard in shards()])
    group = ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")
    assert statistics[group].tokens == 0
    assert not statistics[group].gram.any()
    assert statistics["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"].tokens > 0
    recipe = module_recipe(weights={"bits": 4, "quantizer": {"kind": "gptq"}}, compensation={"kind": "svd"})
    linears, reports = compressed(block, statistics, dict.fromkeys(group, recipe))
    for name in group:
        assert (reports[name].tokens, reports[name].error_quantized, reports[name].error_compensated) == (0, None, None)
        assert {fallback.step for fallback in reports[name].fallbacks} >= {"gptq.tokens", "svd.tokens"}
        weight = block.linear(name).weight
        error = (linears[name].weight.dequantize() - weight).norm() / weight.norm()
        assert error < 0.2


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(poison: float) -> None:
    hidden = shards()
    hidden[2][1, 5, 7] = poison
    with pytest.raises(RequestError, match=r"input of self_attn\.(q|o)_proj is not finite"):
        calibrated(block_of("llama"), hidden)


def test_moments_beyond_float32_are_refused() -> None:
    block = block_of("llama")
    with torch.no_grad():
        block.layer.get_parameter("post_attention_layernorm.weight")[5] = 1e25
    with pytest.raises(RequestError, match=r"input of mlp\.(gate|down)_proj is not finite"):
        calibrated(block, shards())


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("compensation", [{"kind": "none"}, {"kind": "svd", "rank": {"count": 8}}])
def test_errors_are_those_of_the_outputs(quantizer: str, compensation: dict[str, Any]) -> None:
    block, hidden = block_of("qwen2"), shards()
    statistics, _ = calibrated(block, hidden)
    recipe = module_recipe(
        weights={"bits": 3, "group_size": 32, "quantizer": {"kind": quantizer}}, compensation=compensation
    )
    recipes = {name: recipe for group in block.groups for name in group}
    linears, reports = compressed(block, statistics, recipes)
    assert list(reports) == list(recipes)
    seen = inputs_of(block, hidden)
    for name, report in reports.items():
        weight, linear, x = block.linear(name).weight.detach().double(), linears[name], seen[name]
        quantized = linear.weight.dequantize(torch.float64)
        full = quantized if linear.low_rank is None else quantized + linear.low_rank.product(torch.float64)
        output = (x @ weight.T).square().sum()
        assert report.error_quantized == pytest.approx(
            float((x @ (weight - quantized).T).square().sum() / output), rel=1e-4
        )
        assert report.error_compensated == pytest.approx(
            float((x @ (weight - full).T).square().sum() / output), rel=1e-4
        )
        if linear.low_rank is None:
            assert report.error_compensated == report.error_quantized
        else:
            assert report.error_compensated < 0.9 * report.error_quantized


def test_an_error_is_never_negative() -> None:
    """Eight tokens span eight directions: a branch of rank 16 leaves nothing but rounding."""
    block = block_of("qwen2")
    statistics, _ = calibrated(block, shards(1, sequences=1, length=8))
    recipe = module_recipe(compensation={"kind": "svd", "rank": {"count": 16}})
    _, reports = compressed(block, statistics, {name: recipe for group in block.groups for name in group})
    for report in reports.values():
        assert report.error_compensated is not None
        assert 0 <= report.error_compensated < 1e-6


def test_linears_of_one_input_and_recipe_get_what_each_would_get_alone() -> None:
    block = block_of("llama")
    statistics, _ = calibrated(block, shards())
    group = block.groups[0]
    recipe = module_recipe(compensation={"kind": "svd", "rank": {"count": 4}})
    together, _ = compressed(block, statistics, dict.fromkeys(group, recipe))
    for name in group:
        alone, _ = compressed(block, {group: statistics[group]}, {name: recipe})
        assert torch.equal(alone[name].weight.codes, together[name].weight.codes)
        assert torch.equal(alone[name].weight.scale, together[name].weight.scale)
        one, other = alone[name].low_rank, together[name].low_rank
        assert one is not None
        assert other is not None
        assert torch.equal(one.up, other.up)


def test_every_sibling_gets_its_own_recipe() -> None:
    block = block_of("llama")
    statistics, _ = calibrated(block, shards())
    recipes = {
        "self_attn.q_proj": module_recipe(),
        "self_attn.v_proj": module_recipe(weights={"bits": 8, "group_size": 32, "symmetric": False, "quantizer": RTN}),
    }
    linears, reports = compressed(block, statistics, recipes)
    assert list(linears) == ["self_attn.q_proj", "self_attn.v_proj"]
    query, value = linears["self_attn.q_proj"], linears["self_attn.v_proj"]
    assert (query.weight.bits, query.weight.group_size, query.weight.zero_point) == (4, None, None)
    assert (value.weight.bits, value.weight.group_size, value.activations) == (8, 32, None)
    assert value.weight.zero_point is not None
    assert reports["self_attn.v_proj"].bits == 8


def test_threads_change_no_bit_of_the_solves() -> None:
    block = block_of("mixtral")
    statistics, _ = calibrated(block, shards())
    recipe = module_recipe(
        weights={"bits": 4, "group_size": 32, "quantizer": {"kind": "gptq"}}, compensation={"kind": "svd"}
    )
    recipes = {name: recipe for group in block.groups for name in group}
    first, first_reports = compressed(block, statistics, recipes)
    for threads in (2, 3):
        other, other_reports = compressed(block, statistics, recipes, threads)
        assert list(other) == list(first)
        for name, linear in first.items():
            assert torch.equal(other[name].weight.codes, linear.weight.codes)
            assert torch.equal(other[name].weight.scale, linear.weight.scale)
            one, two = linear.low_rank, other[name].low_rank
            assert one is not None
            assert two is not None
            assert torch.equal(one.up, two.up)
            assert torch.equal(one.down, two.down)
            assert other_reports[name].error_quantized == first_reports[name].error_quantized


def test_bits_are_counted_all_in() -> None:
    block = block_of("llama")
    statistics, _ = calibrated(block, shards())
    recipe = module_recipe(
        weights={"bits": 3, "group_size": 32, "symmetric": False, "quantizer": RTN},
        compensation={"kind": "svd", "rank": {"count": 4}},
    )
    _, reports = compressed(block, statistics, {"mlp.gate_proj": recipe})
    report = reports["mlp.gate_proj"]  # [96, 64], two groups
    assert (report.rows, report.columns, report.rank) == (96, 64, 4)
    assert report.code_bits == 96 * 64 * 3
    assert report.scale_bits == 96 * 2 * (16 + 3)
    assert report.factor_bits == (96 + 64) * 4 * 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_and_factors_are_stored_as_asked(dtype: torch.dtype) -> None:
    block = block_of("llama")
    statistics, _ = calibrated(block, shards())
    group = block.groups[1]
    weights = {name: block.linear(name).weight.detach().bfloat16() for name in group}
    recipes = dict.fromkeys(group, module_recipe(compensation={"kind": "svd"}))
    linears, _ = compress(
        weights,
        statistics,
        recipes,
        scale_dtypes=dict.fromkeys(group, dtype),
        factor_dtypes=dict.fromkeys(group, torch.bfloat16),
        pool=OrderedPool(1),
    )
    linear = linears["self_attn.o_proj"]
    assert linear.weight.scale.dtype is dtype
    assert linear.low_rank is not None
    assert linear.low_rank.up.dtype is torch.bfloat16


@pytest.mark.parametrize("case", ["llama-tied-biased", "mixtral", "phi3"])
@pytest.mark.parametrize("compensated", [True, False])
def test_an_installed_block_is_the_block_with_other_weights(case: str, compensated: bool) -> None:
    block, hidden = block_of(case), shards(2)
    statistics, _ = calibrated(block, hidden)
    recipe = module_recipe(compensation={"kind": "svd", "rank": {"count": 4}})
    recipes = {name: recipe for group in block.groups for name in group}
    linears, _ = compressed(block, statistics, recipes)
    dense, installed = block.replica(), block.replica()
    for name, linear in linears.items():
        weight = linear.weight.dequantize()
        if compensated and linear.low_rank is not None:
            weight = weight + linear.low_rank.product()
        dense.linear(name).weight = nn.Parameter(weight)
    install(installed, linears, compensated=compensated)
    assert isinstance(installed.layer.get_submodule("self_attn.o_proj"), CompensatedLinear)
    torch.testing.assert_close(installed.run(hidden[0]), dense.run(hidden[0]), rtol=1e-4, atol=1e-4)
    assert (installed.run(hidden[0]) - block.run(hidden[0])).abs().max() > 1e-3


def test_a_branch_that_is_anticipated_is_quantized_for_and_pays() -> None:
    """SharedInputGroup of other sizes have other ranks, so each has a solve of its own."""
    block = block_of("llama")
    group = block.groups[0]
    width = block.linear(group[0]).weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -1.5, width)  # directions of unlike energy, as inputs of trained models have
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    statistics = {group: InputStatistics.of(torch.randn(4096, width, generator=generator) * strength @ mixing)}
    quantized: dict[float, float] = {}
    with_branch: dict[float, float] = {}
    for share in (0.0, 0.9):
        recipe = module_recipe(
            weights={"bits": 2, "quantizer": {"kind": "gptq"}},
            compensation={"kind": "svd", "rank": {"fraction": 0.25}, "anticipation": share},
        )
        _, reports = compressed(block, statistics, dict.fromkeys(group, recipe))
        assert len({report.rank for report in reports.values()}) == 2
        quantized[share] = sum(report.error_quantized or 0.0 for report in reports.values())
        with_branch[share] = sum(report.error_compensated or 0.0 for report in reports.values())
    assert quantized[0.9] > quantized[0.0]
    assert with_branch[0.9] < with_branch[0.0]
