"""Smoothing: the block's function stays, the scales are where they should be, and choices do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.kernels.hadamard import Hadamard
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.compensation.aser import outlier_channels, outlier_scales, without_channels
from counterweight.workers.methods.compensations import ASER
from counterweight.workers.methods.compensations.rank import BudgetRank, CountRank, EnergyRank, FractionRank
from counterweight.workers.methods.grid import WeightFormat
from counterweight.workers.methods.transforms import Rotation, Smoothing
from counterweight.workers.methods.weights import Weights
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.families import families, family_of
from counterweight.workers.models.family import SharedInputGroup
from counterweight.workers.storage import open_store
from counterweight.workers.transforms.rotation import rotate_block
from counterweight.workers.transforms.smoothing import fold, migration_scales, producer_rows
from tests.models import checkpoint

FAMILIES = [*families()]


def block_of(family: str, directory: Path) -> tuple[BlockBuilder, dict[str, Tensor]]:
    checkpoint(family, directory, num_hidden_layers=1)
    reader = Checkpoint.open(open_store(directory.as_uri()))
    builder = BlockBuilder(reader.config, frozenset(reader.names))
    sources = builder.layout.sources(0, reader.names)
    return builder, {name: part.of(reader.read(part.source)) for name, part in sources.items()}


def scales_of(width: int, seed: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_block_computes_the_same(family: str, tmp_path: Path) -> None:
    builder, parameters = block_of(family, tmp_path)
    known, cpu = family_of(family), torch.device("cpu")
    scales: dict[SharedInputGroup, Tensor] = {}
    for number, group in enumerate(builder.layout.block_linears(0)):
        if producer_rows(known, group, parameters, builder.config.num_attention_heads) is not None:
            scales[group] = scales_of(parameters[f"{group[0]}.weight"].shape[1], number)
    assert any("down_proj" in group[0] for group in scales) == (known.up is not None)
    folded = fold(known, scales, parameters, heads=builder.config.num_attention_heads)
    hidden = torch.randn(2, 9, builder.hidden_size, generator=torch.Generator().manual_seed(1))
    before, after = (builder.block(0, tensors, cpu, torch.float32).run(hidden) for tensors in (parameters, folded))
    assert torch.allclose(before, after, atol=1e-5, rtol=1e-4)
    for group, scale in scales.items():
        for name in group:
            expected = parameters[f"{name}.weight"].float() * scale.float()
            own_rows = producer_rows(known, group, parameters, builder.config.num_attention_heads)
            # A linear that takes in scales for another (up, v) also has its rows divided.
            if not any(
                producer_rows(known, g, parameters, builder.config.num_attention_heads) == (f"{name}.weight", own_rows)
                for g in scales
            ):
                columns = folded[f"{name}.weight"] / expected
                assert torch.allclose(columns, columns[:, :1].expand_as(columns), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_scales_come_before_an_online_rotation(family: str, tmp_path: Path) -> None:
    builder, parameters = block_of(family, tmp_path)
    known, cpu = family_of(family), torch.device("cpu")
    config = builder.config
    rotated, online = rotate_block(
        family,
        parameters,
        Rotation(residual=False, heads=False),
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
    )
    scales = {
        group: scales_of(parameters[f"{group[0]}.weight"].shape[1], number)
        for number, group in enumerate(builder.layout.block_linears(0))
        if group[0] in online
    }
    assert scales
    hidden = torch.randn(2, 9, builder.hidden_size, generator=torch.Generator().manual_seed(1))
    outputs = []
    for tensors in (rotated, fold(known, scales, rotated, online, heads=builder.config.num_attention_heads)):
        block = builder.block(0, tensors, cpu, torch.float32)
        for name, transform in online.items():
            block.transform_input(name, transform)
        outputs.append(block.run(hidden))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)


def test_a_search_behind_a_rotation_looks_behind_it() -> None:
    rows, transform = outlier_rows(), Hadamard(size=64)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 5] /= 50  # as where an up_proj made the outlier
    asked = ActivationFormat(bits=4)
    found = migration_scales(
        Smoothing(), [transform.apply(weight)], transform.apply(rows), Weights(bits=4).nearest, asked, transform
    )
    assert found.argmax() == 5
    assert found[5] > 5 * found.median()


@pytest.mark.parametrize(("family", "foldable"), [("llama", False), ("phi3", False), ("mixtral", False)])
def test_grouped_queries_have_no_place_for_scales_before_o(family: str, foldable: bool, tmp_path: Path) -> None:
    builder, parameters = block_of(family, tmp_path)
    grouped = builder.config.num_key_value_heads != builder.config.num_attention_heads
    place = producer_rows(family_of(family), ("self_attn.o_proj",), parameters, builder.config.num_attention_heads)
    assert (place is not None) == (foldable or not grouped)


def test_experts_that_share_their_input_with_a_router_are_left_alone(tmp_path: Path) -> None:
    builder, parameters = block_of("mixtral", tmp_path)
    known = family_of("mixtral")
    groups = {
        group[0]: producer_rows(known, group, parameters, builder.config.num_attention_heads)
        for group in builder.layout.block_linears(0)
    }
    assert groups["mlp.experts.0.gate_proj"] is None
    assert groups["mlp.experts.0.down_proj"] == ("mlp.experts.0.up_proj.weight", slice(0, None))
    with pytest.raises(ValueError, match=r"gate_proj: nothing before it"):
        fold(known, {("mlp.experts.0.gate_proj",): torch.ones(1)}, parameters, heads=builder.config.num_attention_heads)


def outlier_rows(width: int = 64) -> Tensor:
    rows = torch.randn(512, width, generator=torch.Generator().manual_seed(0))
    rows[:, 5] *= 50
    return rows


def output_error(weight: Tensor, rows: Tensor, scales: Tensor, bits: int) -> float:
    from counterweight.kernels.reference import fake_quantize_activations
    from counterweight.workers.methods.scales import AbsoluteMaximum

    scaled = weight * scales.float()
    codes = AbsoluteMaximum().fit(scaled, WeightFormat(bits=4), torch.float32, None).round(scaled).dequantize()
    seen = fake_quantize_activations(rows / scales.float(), ActivationFormat(bits=bits))
    return float((seen @ codes.T - rows @ weight.T).square().sum())


def test_a_searched_strength_is_no_worse_than_any_that_is_given() -> None:
    rows = outlier_rows()
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    asked = ActivationFormat(bits=8)

    def error(strength: float | str) -> float:
        options = Smoothing.model_validate({"strength": strength})
        return output_error(weight, rows, migration_scales(options, [weight], rows, Weights(bits=4).nearest, asked), 8)

    searched = error("search")
    assert all(searched <= error(strength) * (1 + 1e-9) for strength in (0.05, 0.25, 0.5, 0.75, 1.0))
    assert searched < 0.7 * output_error(weight, rows, torch.ones(64), 8)
    assert error(0.25) != error(0.75)


def test_the_search_sees_quantized_activations() -> None:
    rows = outlier_rows()
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    alone, seen = (
        migration_scales(Smoothing(), [weight], rows, Weights(bits=8).nearest, activations)
        for activations in (None, ActivationFormat(bits=4))
    )
    assert not torch.equal(alone, seen)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_scales_are_those_of_the_formula(strength: float) -> None:
    """E|x|^a / (mean |w|)^(1 - a), of a geometric mean of one."""
    rows, weights = outlier_rows(), [torch.randn(8, 64), torch.randn(24, 64)]
    found = migration_scales(Smoothing(strength=strength), weights, rows, Weights().nearest, None)
    size = torch.cat(weights).double().abs().mean(0)
    expected = rows.double().abs().mean(0) ** strength / size ** (1 - strength)
    assert torch.allclose(found, expected / expected.log().mean().exp(), rtol=1e-5)
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-9)


def test_channels_that_nobody_uses_stay() -> None:
    rows, weight = outlier_rows(), torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    rows[:, 3], weight[:, 7] = 0, 0
    scales = migration_scales(Smoothing(strength=0.5), [weight], rows, Weights().nearest, None)
    assert scales[[3, 7]].tolist() == [1, 1]
    assert bool(torch.isfinite(scales).all())


def test_outliers_are_those_of_large_activations_or_products() -> None:
    magnitude, weight = torch.ones(16, dtype=torch.float64), torch.ones(4, 16)
    magnitude[3], weight[:, 3] = 8.0, 0.1  # large activations, small weights
    magnitude[9], weight[:, 9] = 2.0, 2.0
    options = {"rank": CountRank(count=4), "outliers": 1}
    assert outlier_channels([weight], magnitude, 4, ASER(**options)).tolist() == [3]  # type: ignore[arg-type]
    assert outlier_channels([weight], magnitude, 4, ASER(**options, choose="product")).tolist() == [9]  # type: ignore[arg-type]


def test_outliers_leave_half_of_the_rank_to_the_error() -> None:
    magnitude, weight = torch.arange(40, dtype=torch.float64), torch.ones(30, 40)
    for rows, options, expected in (
        (30, ASER(rank=CountRank(count=10)), 5),
        (30, ASER(rank=CountRank(count=30), outliers=7), 7),
        (30, ASER(rank=CountRank(count=1)), 0),
        (10, ASER(rank=FractionRank(fraction=0.4)), 2),
        (10, ASER(rank=EnergyRank(energy=0.1)), 5),
        (30, ASER(rank=BudgetRank(budget_bits=1.0)), 15),
    ):
        assert len(outlier_channels([weight], magnitude, rows, options)) == expected


def test_outlier_channels_come_down_to_the_reference() -> None:
    magnitude = torch.tensor([1.0, 2.0, 3.0, 40.0, 80.0], dtype=torch.float64)
    channels = torch.tensor([3, 4])
    assert outlier_scales(magnitude, channels, ASER()).tolist() == [1, 1, 1, 40 / 3, 80 / 3]
    assert outlier_scales(magnitude, channels, ASER(reference="minimum")).tolist() == [1, 1, 1, 1, 2]
    weight = torch.ones(2, 5)
    assert without_channels(weight, channels).tolist() == [[1, 1, 1, 0, 0]] * 2
    assert weight.sum() == 10
