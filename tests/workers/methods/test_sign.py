"""Signs and two vectors: the best there are, from the chosen signs to a published artifact."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from counterweight import load_model
from counterweight.kernels.linear import CompensatedLinear
from counterweight.pipeline.cli import main
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.methods.weights import SignWeights
from counterweight.workers.methods.weights.sign import nearest_signs
from tests.inprocess import local
from tests.patience import cpu_seconds
from tests.pipeline.tiny import job_of, run_local, write_job

OPTIONS = SignWeights(format="sign")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, stored: Tensor, importance: Tensor | None = None) -> float:
    squares = (weight.double() - stored.double()).square()
    return float((squares if importance is None else squares * importance.double()).sum())


def test_no_other_signs_and_scales_are_nearer() -> None:
    """All signs of a small matrix, each with its own best scales: of S o W, whose rank-one part need not be non-negative."""
    weight = random(3, 3)
    found = error(weight, nearest_signs(weight, None, torch.float64).dequantize(torch.float64))
    best = min(
        _rank_one_error(weight.double() * torch.tensor(signs, dtype=torch.float64).reshape(3, 3))
        for signs in product((-1.0, 1.0), repeat=9)
    )
    assert found == pytest.approx(best, rel=1e-6)


def _rank_one_error(matrix: Tensor) -> float:
    values = numpy.linalg.svd(matrix.numpy(), compute_uv=False)
    return float((values[1:] ** 2).sum())


def test_the_error_is_what_eckart_and_young_leave() -> None:
    weight, importance = random(20, 50), random(50, seed=1).square() + 0.1
    for counted in (None, importance):
        stored = nearest_signs(weight, counted, torch.float64).dequantize(torch.float64)
        roots = torch.ones(50) if counted is None else counted.sqrt()
        assert error(weight, stored, counted) == pytest.approx(
            _rank_one_error((weight.abs() * roots).double()), rel=1e-5
        )


@pytest.mark.parametrize("closeness", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
def test_of_two_directions_of_nearly_one_strength_either_is_taken(closeness: float) -> None:
    """Power iteration does not settle on one of them; what it has come to is as good."""
    weight = torch.block_diag(random(20, 30).abs(), (1 - closeness) * random(20, 30).abs())
    for counted in (None, random(60, seed=1).square() + 0.1):
        roots = torch.ones(60) if counted is None else counted.sqrt()
        stored = nearest_signs(weight, counted, torch.float64).dequantize(torch.float64)
        energy = error(weight, torch.zeros_like(weight), counted)
        assert error(weight, stored, counted) - _rank_one_error((weight.abs() * roots).double()) < 1e-3 * energy


@pytest.mark.parametrize("make", [torch.zeros, torch.ones, lambda *shape: torch.eye(*shape)[:, : shape[1]]])
def test_weights_that_are_hardly_any(make: Callable[..., Tensor]) -> None:
    weight = make(12, 9)
    stored = nearest_signs(weight, None, torch.float32)
    assert bool(torch.isfinite(stored.dequantize()).all())
    if bool((weight == 1).all()):
        assert torch.allclose(stored.dequantize(), weight)


def test_a_large_weight_takes_no_whole_decomposition() -> None:
    weight = random(1024, 2048)
    spent = cpu_seconds(lambda: nearest_signs(weight, None, torch.float32), below=2.0)
    assert spent < 2.0, "a singular value decomposition of this size takes ten times as long"


def test_channels_that_see_more_count_more() -> None:
    weight = random(16, 40)
    x = random(200, 40, seed=2) * torch.linspace(0.01, 3, 40)
    statistics = InputStatistics(gram=(x.T @ x).double(), tokens=200)
    importance = x.square().mean(0)
    errors = [
        error(
            weight,
            options.quantize(weight, statistics, scale_dtype=torch.float32).weight.dequantize(),
            importance,
        )
        for options in (OPTIONS, SignWeights(format="sign", weighted=False))
    ]
    assert errors[0] < errors[1]


def test_without_a_token_channels_count_alike_and_that_is_recorded() -> None:
    weight = random(8, 40)
    nothing = InputStatistics(gram=torch.zeros(40, 40, dtype=torch.float64), tokens=0)
    found = OPTIONS.quantize(weight, nothing, scale_dtype=torch.float32)
    assert [fallback.step for fallback in found.fallbacks] == ["sign.weighted"]
    assert torch.equal(found.weight.dequantize(), nearest_signs(weight, None, torch.float32).dequantize())


def test_a_scale_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a scale exceeds the range of torch\.float16"):
        nearest_signs(random(4, 40) * 1e12, None, torch.float16)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("compensation", ["{kind: svd, rank: {count: 4}}", "{kind: lrc, rank: {count: 4}}"])
def test_an_artifact_of_signs(family: str, compensation: str, tmp_path: Path) -> None:
    """Published with a branch, read back with the figures that were validated, refused by transformers."""
    from transformers import AutoModelForCausalLM

    manifest = write_job(tmp_path, case=family)
    overrides = [
        "spec.recipe.weights={format: sign}",
        f"spec.recipe.compensation={compensation}",
        "spec.recipe.residual={channels_per_chunk: 64}",
        "spec.recipe.overrides=[{match: '*.layers.0.*', weights: {bits: 8}}]",
    ]
    published = run_local(job_of(manifest, *overrides))
    document = published.document
    assert document.compensated is not None
    assert document.quantized is not None
    assert document.compensated.kl < document.quantized.kl
    model = load_model(published.uri)
    kinds = {name: m.weight.kind for name, m in model.named_modules() if isinstance(m, CompensatedLinear)}
    assert {kind for name, kind in kinds.items() if ".layers.0." in name} == {"uniform"}
    assert {kind for name, kind in kinds.items() if ".layers.0." not in name} == {"sign"}
    with pytest.raises((ValueError, KeyError), match="counterweight"):
        AutoModelForCausalLM.from_pretrained(local(published))


def test_what_does_not_go_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_job(tmp_path)
    for changes, message in [
        (
            [
                "spec.recipe.weights={format: sign}",
                "spec.recipe.tuning={kind: lsi}",
                "spec.recipe.compensation={kind: none}",
            ],
            "tuning: expected weights.quantizer.kind rtn, not sign",
        ),
        (["spec.recipe.weights={format: sgn}"], "spec.recipe.weights.format: 'sgn': expected sign"),
        (
            ["spec.recipe.weights={format: sign, bits: 1}"],
            "spec.recipe.weights: {'format': 'sign', 'bits': 1}: expected",
        ),
        (["spec.recipe.weights={bits: 9}"], "spec.recipe.weights.bits: 9: expected 2, 3, 4 or 8"),
    ]:
        arguments = [argument for change in changes for argument in ("--set", change)]
        assert main(["plan", str(manifest), *arguments]) == 2
        assert message in capsys.readouterr().err
