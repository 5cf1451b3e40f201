"""Second moments that no step of a recipe looks at are not gathered: the result is the same, judged by held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from counterweight.workers.calibrated_block import calibrated
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.records import STARVED
from counterweight.workers.worker import Worker
from tests.workers.test_passes import GPTQ, content, run, site_of, spec_of

RTN: Mapping[str, Any] = {"weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}}}
UNWEIGHTED = {"kind": "rtn", "scale": {"kind": "mse", "weighted": False}}
WEIGHTED = {"kind": "rtn", "scale": {"kind": "mse"}}


def svd(whitening: str) -> dict[str, Any]:
    return {**RTN, "compensation": {"kind": "svd", "rank": {"count": 4}, "whitening": whitening}}


NOTHING = {
    "RTN": RTN,
    "quantized input": {**RTN, "activations": {"bits": 8, "clip": "search"}},
    "scale search": {"weights": {**RTN["weights"], "quantizer": UNWEIGHTED}},
    "LoRC": svd("none"),
    "L2QER": svd("magnitude"),
    "residual store": {**RTN, "residual": {}},
    "smoothing": {**RTN, "transforms": [{"kind": "smoothing"}]},
}
PRODUCTS = {
    "GPTQ": GPTQ,
    "weighted": {"weights": {**RTN["weights"], "quantizer": WEIGHTED}},
    "sign": {"weights": {"format": "sign"}},
    "diagonal": svd("diagonal"),
    "full": svd("full"),
    "static": {**RTN, "residual": {"selection": "static"}},
    "budget": {**RTN, "compensation": {"kind": "svd", "whitening": "none", "rank": {"budget_bits": 1.0}}},
}


def gathered_bytes(spec: BlockSpec) -> int:
    """Of the sums of products that calibration leaves."""
    worker = Worker("cpu")
    try:
        packed = calibrated(worker.context, spec, spec.setting.open_workspace()).statistics.packed
    finally:
        worker.close()
    return sum(triangle.nbytes for found in packed.values() for triangle in found.triangles.values())


@pytest.mark.parametrize("name", [*NOTHING, *PRODUCTS])
def test_products_are_gathered_where_a_step_looks_at_them(name: str, tmp_path: Path) -> None:
    spec = spec_of(site_of("llama", tmp_path), {**NOTHING, **PRODUCTS}[name])
    assert gathered_bytes(spec) > 0, "errors follow from them where nothing is held out"
    assert (gathered_bytes(spec.model_copy(update={"held_out_from": 2})) > 0) == (name in PRODUCTS)


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_made_does_not_depend_on_them(name: str, tmp_path: Path) -> None:
    spec = spec_of(site_of("llama", tmp_path), NOTHING[name])
    found = content(run(Compress(block=spec.model_copy(update={"held_out_from": 2}))))
    plain = content(run(Compress(block=spec.before(2))))
    for kind in ("tensors", "factors", "residuals", "ledger", "formats"):
        assert found[kind] == plain[kind]
    for module in found["modules"]:
        assert module["tokens"] == 96
        assert module["error_quantized"] is None
        assert 0 < module["held_out"]["compensated"] <= 1.5 * module["held_out"]["quantized"]


def test_an_expert_is_not_starved_of_tokens_that_nothing_looks_at(tmp_path: Path) -> None:
    site = site_of("mixtral", tmp_path)
    starved = {}
    for name, recipe in {"RTN": RTN, "L2QER": svd("magnitude")}.items():
        spec = spec_of(site, recipe, experts=ExpertCalibration(floor=64)).model_copy(update={"held_out_from": 2})
        modules = run(Compress(block=spec)).modules
        starved[name] = any(fallback.step == STARVED for module in modules for fallback in module.fallbacks)
        assert all(module.held_out is not None for module in modules)
    assert starved == {"RTN": False, "L2QER": True}


def test_statistics_without_products_are_not_taken_for_those_with(tmp_path: Path) -> None:
    site = site_of("llama", tmp_path)
    keys = {spec_of(site, recipe).statistics_key() for recipe in (RTN, svd("none"), svd("full"), svd("diagonal"))}
    assert len(keys) == 2
