"""Weights that are solved in one batch get the bits that each gets alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from counterweight.kernels.weights.uniform import UniformWeight
from counterweight.workers.arithmetic.solving import solving
from counterweight.workers.batches import BATCH_BYTES, batch_size, batches, coding
from counterweight.workers.block import compress
from counterweight.workers.calibration.clipping import activation_format
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.footprint.load import Group, Load
from counterweight.workers.footprint.solves import Solve, batched
from counterweight.workers.matrix_flops import Work
from counterweight.workers.methods.weights import AnyWeights, StoredWeights
from counterweight.workers.models.families.mixtral import FAMILY as MIXTRAL
from counterweight.workers.parallel import OrderedPool
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.solve import LayerState, solve

GPTQ: dict[str, Any] = {"bits": 4, "group_size": 32}
LOAD = Load(
    family=MIXTRAL,
    heads=1,
    groups=(),
    source_bytes=2,
    parameters=1,
    compute=4,
    hidden=96,
    shard=64,
    shards=2,
    length=32,
    sequences=8,
    token_scores=0,
    paired=False,
    compressed=False,
    rotation=None,
    stretched=False,
    threads=1,
    gpu=False,
)


def statistics_of(columns: int, tokens: int, seed: int) -> InputStatistics:
    generator = torch.Generator().manual_seed(seed)
    return InputStatistics.of(
        torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator)
    )


def problems(count: int, rows: int, columns: int) -> tuple[torch.Tensor, list[InputStatistics]]:
    """Weights, with statistics of many tokens, of few, and, the second one's, of none."""
    weights = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(0))
    seen = [statistics_of(columns, 0 if place == 1 else 40 + 30 * place, place) for place in range(count)]
    return weights, seen


def weights_of(**options: Any) -> StoredWeights:
    return TypeAdapter(AnyWeights).validate_python(options)


@pytest.mark.parametrize("rows", [7, 33, 64])
@pytest.mark.parametrize(
    "options",
    [
        GPTQ,
        {**GPTQ, "symmetric": False, "quantizer": {"kind": "gptq", "block_size": 24, "act_order": False}},
        {**GPTQ, "group_size": None, "quantizer": {"kind": "gptq", "refinement": 20, "scale": {"kind": "absmax"}}},
        {**GPTQ, "quantizer": {"kind": "rtn", "scale": {"kind": "mse"}}},
        {"format": "sign"},
    ],
)
def test_a_batch_of_many_and_of_one(options: dict[str, Any], rows: int) -> None:
    method, (weights, seen) = weights_of(**options), problems(9, rows, 96)
    together = method.quantize_batch(weights, seen, scale_dtype=torch.float16)
    for weight, statistics, found in zip(weights, seen, together, strict=True):
        alone = method.quantize(weight, statistics, scale_dtype=torch.float16)
        assert alone.fallbacks == found.fallbacks
        assert alone.weight.tensors().keys() == found.weight.tensors().keys()
        for name, tensor in alone.weight.tensors().items():
            assert torch.equal(tensor, found.weight.tensors()[name]), name
    assert together[1].fallbacks
    assert together[0].fallbacks != together[1].fallbacks


def test_sixty_four_experts() -> None:
    weights = torch.randn(64, 256, 128, generator=torch.Generator().manual_seed(1))
    seen = [statistics_of(128, 300, place) for place in range(64)]
    method = weights_of(bits=4, group_size=128)
    together = method.quantize_batch(weights, seen, scale_dtype=torch.float16)
    for place in (0, 31, 63):
        alone = method.quantize(weights[place], seen[place], scale_dtype=torch.float16).weight
        found = together[place].weight
        assert isinstance(alone, UniformWeight)
        assert isinstance(found, UniformWeight)
        assert torch.equal(alone.codes, found.codes)
        assert torch.equal(alone.scale, found.scale)


@pytest.mark.parametrize("compensation", [{"kind": "none"}, {"kind": "svd", "rank": {"count": 4}}])
def test_layers_that_share_an_input_are_one_matrix_of_the_batch(compensation: dict[str, Any]) -> None:
    recipe = ModuleRecipe.model_validate({"weights": GPTQ, "activations": None, "compensation": compensation})
    weights, seen = problems(6, 32, 64)
    layers = [
        LayerState(weight=weight, statistics=seen[place // 2], scale_dtype=torch.float16, factor_dtype=torch.float32)
        for place, weight in enumerate(weights)
    ]
    together = solve(recipe, layers)
    apart = [one for first in (0, 2, 4) for one in solve(recipe, layers[first : first + 2])]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.stored.dequantize(), other.stored.dequantize())
        assert one.fallbacks == other.fallbacks
        assert one.errors() == other.errors()
    moved = solve(recipe, [replace(layers[0], statistics=seen[2])])
    assert not torch.equal(moved[0].stored.dequantize(), together[0].stored.dequantize())


@pytest.mark.parametrize("options", [{}, {"iterations": 3}, {"refit": "none", "factor_bits": 4}, {"refit": "weight"}])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_with_their_branches_in_a_batch_and_alone(options: dict[str, Any], bits: int) -> None:
    """At 8 bits some layers ask for plain codes too, and others have done with one loop."""
    compensation = {"kind": "lrc", "rank": {"count": 4}, **options}
    recipe = ModuleRecipe.model_validate({"weights": GPTQ, "activations": {"bits": bits}, "compensation": compensation})
    gathering = Gathering(activations=activation_format(recipe.activations))
    layers = [
        LayerState(
            weight=torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)) * (1 + 3 * (seed % 2)),
            statistics=InputStatistics.of(
                torch.randn(0 if seed == 1 else 90, 64, generator=torch.Generator().manual_seed(seed))
                * torch.tensor([8.0 if seed == 2 else 1.0] + [1.0] * 63),
                gathering,
            ),
            scale_dtype=torch.float16,
            factor_dtype=torch.float32,
        )
        for seed in range(5)
    ]
    together = solve(recipe, layers)
    for one, layer in zip(together, layers, strict=True):
        (alone,) = solve(recipe, [layer])
        assert one.branch is not None
        assert alone.branch is not None
        assert torch.equal(one.stored.dequantize(), alone.stored.dequantize())
        assert torch.equal(one.branch.product(), alone.branch.product())
        assert one.fallbacks == alone.fallbacks


def test_a_blocks_experts_have_their_bits_and_their_order_whatever_the_batch() -> None:
    weights, statistics = {}, {}
    for expert in range(5):
        for place, shape in {"up": (64, 32), "down": (32, 64)}.items():
            name = f"experts.{expert}.{place}"
            weights[name] = torch.randn(*shape, generator=torch.Generator().manual_seed(expert))
            statistics[(name,)] = statistics_of(shape[1], 100, expert)
    recipe = ModuleRecipe.model_validate({"weights": GPTQ, "activations": None, "compensation": {"kind": "none"}})

    def compressed(names: list[str]) -> dict[str, torch.Tensor]:
        dtypes, recipes = dict.fromkeys(names, torch.float16), dict.fromkeys(names, recipe)
        found, reports = compress(
            {name: weights[name] for name in names},
            {(name,): statistics[(name,)] for name in names},
            recipes,
            scale_dtypes=dtypes,
            factor_dtypes=dtypes,
            pool=OrderedPool(1),
        )
        assert list(found) == [report.name for report in reports] == names
        return {name: one.weight.dequantize() for name, one in found.items()}

    together = compressed(list(weights))
    for name in weights:
        assert torch.equal(compressed([name])[name], together[name])


def test_batches_keep_to_their_bytes() -> None:
    recipe = ModuleRecipe.model_validate({"weights": GPTQ, "activations": None, "compensation": {"kind": "none"}})
    small, large = [(256, 128)], [(14336, 4096)]
    cpu, gpu = BATCH_BYTES[False], BATCH_BYTES[True]
    count = batch_size(recipe, small, cpu)
    assert count >= 32
    assert coding(recipe, small, count) <= cpu < coding(recipe, small, 2 * count)
    assert batch_size(recipe, large, cpu) == 1
    assert batch_size(recipe, small, gpu) > count
    asked = {"weights": GPTQ, "activations": {"bits": 4}, "compensation": {"kind": "lrc"}}
    lrc = ModuleRecipe.model_validate(asked)
    assert 1 < batch_size(lrc, small, cpu) < count
    trained = {**asked, "compensation": {"kind": "none"}, "tuning": {"kind": "lsi"}}
    assert batch_size(ModuleRecipe.model_validate(trained), small, cpu) == 1
    assert batch_size(recipe, large, 3 * coding(recipe, large, 1)) == 2


@pytest.mark.parametrize("compensation", [{"kind": "none"}, {"kind": "lrc", "rank": {"count": 4}}])
def test_the_steps_of_a_batch_are_counted_once_and_its_work_for_each(compensation: dict[str, Any]) -> None:
    """Experts of one shape, with loops over columns that a plan must not count for each of them."""
    part = ModuleRecipe.model_validate({"weights": GPTQ, "activations": {"bits": 4}, "compensation": compensation})

    def planned(count: int) -> tuple[Work, list[list[Solve]]]:
        names = [f"experts.{place}.up" for place in range(count)]
        groups = [Group(linears={n: (64, 96)}, recipe={n: part}, share=0.5, scaled=False) for n in names]
        load = replace(LOAD, groups=groups)
        return solving(load), batched(load)

    (one, _), (eight, calls) = planned(1), planned(8)
    assert [len(call) for call in calls] == [8]
    assert eight.steps == one.steps > 96
    assert eight.total == pytest.approx(8 * one.total)
    whole, calls = planned(2048)
    assert whole.steps == pytest.approx(len(calls) * one.steps)
    assert 1 < len(calls) < 2048


def test_solves_of_one_key_come_together_in_order() -> None:
    found = batches([3, 10, 5, 20, 7, 9], key=lambda item: item >= 10, most=lambda item: 1 if item >= 10 else 3)
    assert found == [[3, 5, 7], [10], [20], [9]]
