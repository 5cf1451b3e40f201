"""Every option of every method does something: with another value, something that is stored or gathered is another.

A field that stands in no table here fails the test, so that a new option cannot be without effect unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
import torch

from counterweight.kernels.formats import ActivationFormat
from counterweight.workers.calibration.clipping import activation_format, best_clip
from counterweight.workers.calibration.statistics import Gathering, InputStatistics
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.config import Method
from counterweight.workers.methods.activations import Activations
from counterweight.workers.methods.compensations import ASER, LRC, SVD, NoCompensation
from counterweight.workers.methods.quantizers import GPTQ, RTN
from counterweight.workers.methods.residual import Residual
from counterweight.workers.methods.scales import AbsoluteMaximum, MeanSquare
from counterweight.workers.methods.weights import AnyWeights
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.solve import LayerState, solve
from tests.workers.kinds import Layer

COUNT = {"count": 6}
RANKED = {"rank": COUNT}
Change = tuple[Mapping[str, Any], Any]
"""Other options that the field needs, and another value of it."""

QUANTIZERS: dict[type[Method], dict[str, Change]] = {
    GPTQ: {
        "damping": ({}, 0.5),
        "act_order": ({}, False),
        "refinement": ({}, 0),
        "scale": ({}, {"kind": "absmax"}),
        "target": ({}, "regressed"),
        "mix": ({"target": "mixed"}, 0.2),
    },
    RTN: {"scale": ({}, {"kind": "mse"})},
    MeanSquare: {
        "norm": ({}, 3.0),
        "candidates": ({}, 5),
        "shrink": ({}, 0.2),
        "weighted": ({}, False),
        "signed": ({}, False),
    },
    AbsoluteMaximum: {},
}
COMPENSATIONS: dict[type[Method], dict[str, Change]] = {
    SVD: {
        "rank": ({}, {"count": 5}),
        "factor_bits": (RANKED, 8),
        "whitening": (RANKED, "diagonal"),
        "damping": (RANKED, 0.5),
        "anticipation": (RANKED, 0.7),
    },
    LRC: {
        "rank": ({}, {"count": 5}),
        "factor_bits": (RANKED, 8),
        "iterations": (RANKED, 3),
        "damping": (RANKED, 0.5),
        "refit": (RANKED, "weight"),
    },
    ASER: {
        "rank": (RANKED, {"count": 3}),
        "factor_bits": (RANKED, 8),
        "outliers": (RANKED, 1),
        "choose": ({"rank": {"count": 16}, "outliers": 8}, "product"),
        "reference": ({"rank": COUNT, "outliers": 2}, "minimum"),
        "smoothing": (RANKED, False),
        "damping": (RANKED, 0.5),
    },
    NoCompensation: {},
}
RESIDUAL: dict[str, Change] = {
    "channels_per_chunk": ({}, 64),
    "selection": ({}, "static"),
    "candidates": ({}, 3),
}
ACTIVATIONS: dict[str, Change] = {
    "bits": ({}, 4),
    "clip": ({}, 0.5),
    "group_size": ({}, 32),
}
SAME_RESULT = {(GPTQ, "block_size"), (Residual, "bits")}
"""A matter of speed, with a test of its own; an option of one value."""

LAYER = Layer("outlier channels", bits=4, rows=32, width=64, tokens=256)
EVEN = Layer("isotropic", bits=4, rows=32, width=64, tokens=256)


def digests(weights: Mapping[str, Any], compensation: Mapping[str, Any], residual: Residual | None = None) -> list[str]:
    """Of everything that is stored of a layer, and of what its input is divided by."""
    recipe = ModuleRecipe.model_validate(
        {"weights": weights, "activations": None, "compensation": compensation, "residual": residual}
    )
    magnitude = LAYER.seen.abs().double().mean(0)
    taken = recipe.compensation.take_out([LAYER.weight], magnitude, len(LAYER.weight))
    statistics = InputStatistics.of(LAYER.seen, Gathering(activations=ActivationFormat(bits=4), thresholds=True))
    state = LayerState(
        weight=LAYER.weight,
        statistics=statistics,
        scale_dtype=torch.float32,
        factor_dtype=torch.float32,
        outliers=None if taken is None else taken.channels,
    )
    (done,) = solve(recipe, [state])
    found = [done.stored.dequantize()]
    if taken is not None and taken.scales is not None:
        found.append(taken.scales)
    if done.branch is not None:
        found.append(done.branch.product())
    if done.residual is not None:
        found.append(done.residual.apply(LAYER.unseen))
    return [tensor_digest(tensor.contiguous()) for tensor in found]


def solved(method: type[Method], options: Mapping[str, Any]) -> list[str]:
    chosen = {"kind": method.model_fields["kind"].default, **options}
    if method in COMPENSATIONS:
        return digests({"bits": 4}, chosen)
    if method in (GPTQ, RTN):
        return digests({"bits": 3, "quantizer": chosen}, {"kind": "none"})
    return digests({"bits": 3, "quantizer": {"kind": "gptq", "scale": chosen}}, {"kind": "none"})


def cases() -> Iterator[Any]:
    for method, changes in {**QUANTIZERS, **COMPENSATIONS}.items():
        for field, (base, value) in changes.items():
            yield pytest.param(method, field, base, value, id=f"{method.__name__}.{field}")


@pytest.mark.parametrize(("method", "field", "base", "value"), cases())
def test_another_value_is_another_layer(method: type[Method], field: str, base: Mapping[str, Any], value: Any) -> None:
    assert solved(method, {**base, field: value}) != solved(method, base)


@pytest.mark.parametrize("field", RESIDUAL)
def test_another_residual_is_another_correction(field: str) -> None:
    weights = {"bits": 3, "quantizer": {"kind": "rtn"}}
    base, value = RESIDUAL[field]
    one, other = (
        digests(weights, {"kind": "none"}, Residual.model_validate({**base, **changed}))
        for changed in ({}, {field: value})
    )
    assert one != other


@pytest.mark.parametrize("field", ACTIVATIONS)
def test_other_activations_are_other_statistics(field: str) -> None:
    base, value = ACTIVATIONS[field]

    def gathered(options: Mapping[str, Any]) -> str:
        activations = Activations.model_validate(options)
        clip = best_clip(EVEN.seen, activations) if activations.clip == "search" else activations.clip
        assert isinstance(clip, float)
        found = InputStatistics.of(EVEN.seen, Gathering(activations=activation_format(activations, clip)))
        return tensor_digest(found.product("yy"))

    assert gathered({**base, field: value}) != gathered(base)
    assert gathered({"bits": 4, "clip": "search"}) != gathered({"bits": 4})


def test_no_option_is_forgotten() -> None:
    tables = {**QUANTIZERS, **COMPENSATIONS, Residual: RESIDUAL, Activations: ACTIVATIONS}
    for method, changes in tables.items():
        fields = method.model_fields.keys() - {"kind"}
        told = changes.keys() | {field for one, field in SAME_RESULT if one is method}
        assert fields == told, method.__name__


def test_every_format_of_weights_is_another_layer() -> None:
    assert len(get_args(AnyWeights)) == 2
    base = digests({"bits": 4}, {"kind": "none"})
    for changed in ({"bits": 3}, {"bits": 4, "group_size": 32}, {"bits": 4, "symmetric": False}, {"format": "sign"}):
        assert digests(changed, {"kind": "none"}) != base
