"""The ways through a block's task that not every recipe takes: paired inputs, training, residual stores, smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from counterweight.kernels.linear import CompensatedLinear
from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.load import load_model
from counterweight.pipeline.artifact.report import Report
from counterweight.workers.ahead import ReadAhead
from counterweight.workers.calibrated_block import calibrated
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.calibration.statistics import InputStatistics
from counterweight.workers.loaded_block import load_block
from counterweight.workers.tasks.calibrate import Calibrate
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tensor_blobs import get_tensors
from counterweight.workers.worker import Worker
from tests.inprocess import run_job
from tests.models import checkpoint
from tests.workers.specs import Site

T = TypeVar("T")

RTN3 = {"bits": 3, "group_size": None, "quantizer": {"kind": "rtn"}}
GPTQ3 = {"bits": 3, "group_size": None, "quantizer": {"kind": "gptq"}}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    return Site(source=tmp_path / "model", work=tmp_path / "work")


def report_of(model: Path, output: Path, recipe: Mapping[str, Any], **options: Any) -> Report:
    published = run_job(model, output, recipe, **options)
    store, _ = open_artifact(published.uri)
    return Report.model_validate_json(store.read("report/report.json"))


def block_error(report: Report) -> float:
    errors = [module.error_after for module in report.modules]
    return sum(error for error in errors if error is not None) / len(errors)


def test_paired_inputs_carry_the_original_stream_beside_the_compressed_one(site: Site) -> None:
    """What leaves the block is what both models make of it; and the statistics see both."""
    worker = Worker("cpu")
    hidden = worker.run(site.embed(torch.arange(64).view(4, 16))).outputs
    recipe = {"weights": RTN3, "compensation": {"kind": "lrc", "rank": {"count": 2}}}
    spec = site.block(0, hidden, recipe, propagate="compressed").model_copy(update={"original_inputs": hidden})
    record = worker.run(Compress(block=spec))
    assert len(record.outputs) == len(record.original_outputs) == len(hidden)
    loaded = load_block(worker.context, site.setting, 0, spec.tensors, torch.float32)
    read = partial(get_tensors, site.workspace)
    expected = loaded.block.run(read(hidden[0])["hidden"])
    assert torch.equal(read(record.original_outputs[0])["hidden"], expected)
    assert not torch.allclose(read(record.outputs[0])["hidden"], expected, atol=1e-3)
    behind = site.block(1, record.outputs, recipe, propagate="compressed").model_copy(
        update={"original_inputs": record.original_outputs}
    )
    statistics: dict[Any, InputStatistics] = calibrated(worker.context, behind, site.workspace).statistics
    for found in statistics.values():
        assert found.streams == {"x", "t"}
        assert not torch.allclose(found.product("tt"), found.gram)


@pytest.mark.parametrize("every_token", [False, True])
def test_the_original_passes_through_a_sparse_block_without_statistics(every_token: bool, tmp_path: Path) -> None:
    """Stretch by stretch, with shards that are held out: to the outputs of a block that is calibrated, under their key."""
    checkpoint("mixtral", tmp_path / "model", num_hidden_layers=1)
    site = Site(source=tmp_path / "model", work=tmp_path / "work")
    worker, calibrating = Worker("cpu"), Worker("cpu")
    hidden = [worker.run(site.embed(torch.arange(first, first + 64).view(4, 16))).outputs[0] for first in (0, 7, 30)]
    experts = ExpertCalibration(every_token=every_token)
    spec = site.block(0, tuple(hidden), experts=experts).model_copy(update={"held_out_from": 2})
    passed = [
        worker.run(Calibrate(block=spec, shards=3, start=start, stop=start + 1, passing=True)) for start in range(3)
    ]
    key = spec.model_copy(update={"recipe": {}}).statistics_key()
    held = worker.context.held.take(key)
    assert held is not None
    assert not held.statistics.packed, "sums that nobody asked for"
    whole = calibrating.run(Calibrate(block=spec, shards=3, stop=3))
    assert tuple(blob for record in passed for blob in record.outputs) == whole.outputs
    assert Calibrate(block=spec, shards=3, stop=3).lookup(site.workspace) is not None


class Counting(ReadAhead):
    """Remembers how many things were not there when they were taken."""

    missing = 0

    def take(self, key: str, read: Callable[[], T]) -> T:
        def counted() -> T:
            self.missing += 1
            return read()

        return super().take(key, counted)


def test_the_following_block_is_read_while_one_is_compressed(site: Site) -> None:
    """To the same bits, and not again when it begins; a worker on a CPU, by itself, reads it then."""
    worker, plain = Worker("cpu"), Worker("cpu")
    hidden = worker.run(site.embed(torch.arange(64).view(4, 16))).outputs
    first, second = site.block(0, hidden), site.block(1, hidden)
    expected = load_block(plain.context, site.setting, 1, second.tensors, torch.float32).parameters
    worker.context.ahead = ahead = Counting(on=True)
    worker.run(Compress(block=first, following=second))
    assert ahead.missing == 1
    found = load_block(worker.context, site.setting, 1, second.tensors, torch.float32).parameters
    assert ahead.missing == 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert Compress(block=first, following=second).key() == Compress(block=first).key()
    plain.context.ahead = unused = Counting(on=False)
    plain.run(Compress(block=second, following=first))
    load_block(plain.context, site.setting, 0, first.tensors, torch.float32)
    assert unused.missing == 2
    ahead.close()


def test_experts_have_no_original_stream_because_a_router_may_send_them_other_tokens(tmp_path: Path) -> None:
    checkpoint("mixtral", tmp_path / "model", num_hidden_layers=2)
    site = Site(source=tmp_path / "model", work=tmp_path / "work")
    worker = Worker("cpu")
    hidden = worker.run(site.embed(torch.arange(64).view(4, 16))).outputs
    # Eight bits leave the routing as it is: as many tokens as in the original model, though that is not the rule.
    recipe = {"weights": {**RTN3, "bits": 8}, "compensation": {"kind": "lrc", "rank": {"count": 2}}}
    first = site.block(0, hidden, recipe, propagate="compressed").model_copy(update={"original_inputs": hidden})
    record = worker.run(Compress(block=first))
    behind = site.block(1, record.outputs, recipe, propagate="compressed").model_copy(
        update={"original_inputs": record.original_outputs}
    )
    statistics: dict[Any, InputStatistics] = calibrated(worker.context, behind, site.workspace).statistics
    streams = {group[0]: found.streams for group, found in statistics.items()}
    assert streams["self_attn.q_proj"] == {"x", "t"}
    assert {seen for name, seen in streams.items() if "experts" in name} == {frozenset({"x"})}


def test_a_target_that_knows_the_original_stream_makes_other_codes(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    errors = [
        block_error(
            report_of(
                tmp_path / "model",
                tmp_path / target,
                {"weights": {**GPTQ3, "quantizer": {"kind": "gptq", "target": target}}},
                calibration={"propagate": "compressed"},
            )
        )
        for target in ("plain", "regressed")
    ]
    assert errors[0] != errors[1]


@pytest.mark.parametrize("transforms", [False, True])
def test_training_beats_rounding_on_the_block_and_is_what_is_stored(transforms: bool, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    tuning = {"epochs": 4, "held_out": 0.25, "transforms": transforms}
    rounded, tuned = (
        report_of(tmp_path / "model", tmp_path / name, {"weights": RTN3, "tuning": options}, validation={})
        for name, options in (("rounded", None), ("tuned", tuning))
    )
    assert tuned.quantized is not None
    assert rounded.quantized is not None
    assert tuned.quantized.kl < 0.97 * rounded.quantized.kl


@pytest.mark.parametrize("selection", ["chunked", "bucketed", "exact", "static"])
def test_a_residual_store_corrects_what_it_is_asked_to(selection: str, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)

    def measured(channels: int) -> Report:
        residual = {"channels_per_chunk": channels, "selection": selection}
        recipe = {"weights": RTN3, "residual": residual}
        return report_of(tmp_path / "model", tmp_path / str(channels), recipe, validation={})

    few, all_ = measured(128), measured(1024)
    assert few.quantized is not None
    assert few.compensated is not None
    assert all_.compensated is not None
    assert all_.compensated.kl < few.compensated.kl < few.quantized.kl
    assert all_.compensated.kl < 0.02 * all_.quantized.kl if all_.quantized is not None else False
    bits = few.bits_per_weight
    assert bits.residual > 4
    assert bits.total == pytest.approx(bits.weights + bits.scales + bits.factors + bits.residual)


def test_a_store_holds_what_the_branch_left(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    recipe = {
        "weights": RTN3,
        "compensation": {"kind": "svd", "rank": {"count": 8}},
        "residual": {"channels_per_chunk": 1024},
    }
    report = report_of(tmp_path / "model", tmp_path, recipe, validation={})
    alone = report_of(tmp_path / "model", tmp_path / "alone", {**recipe, "residual": None}, validation={})
    assert report.compensated is not None
    assert alone.compensated is not None
    assert report.compensated.kl < 0.1 * alone.compensated.kl


def test_stores_correct_decoded_tokens_alone_unless_all_are_asked_for(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    published = run_job(tmp_path / "model", tmp_path, {"weights": RTN3, "residual": {"channels_per_chunk": 512}})
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        decode, everywhere, off = (
            load_model(published.uri, dtype=torch.float32, **options)(input_ids=ids).logits
            for options in ({}, {"residual": "all"}, {"compensated": False})
        )
        assert torch.equal(decode, off)
        assert not torch.allclose(everywhere, off, atol=1e-3)
        one = ids[:, :1]
        decode, everywhere, off = (
            load_model(published.uri, dtype=torch.float32, **options)(input_ids=one).logits
            for options in ({}, {"residual": "all"}, {"compensated": False})
        )
    assert torch.equal(decode, everywhere)
    assert not torch.allclose(decode, off, atol=1e-3)


def test_smoothing_stores_scaled_norms_and_keeps_the_function(tmp_path: Path) -> None:
    original = checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    recipe = {
        "weights": {"bits": 8, "group_size": 32, "quantizer": {"kind": "rtn"}},
        "transforms": [{"kind": "smoothing", "strength": 0.5}],
    }
    model = load_model(run_job(tmp_path / "model", tmp_path, recipe).uri, dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, original(input_ids=ids).logits
    assert (found - expected).norm() < 0.03 * expected.norm()
    norms = [one.model.layers[0].input_layernorm.weight for one in (model, original)]
    assert not torch.allclose(norms[0], norms[1], rtol=0.05)
    assert isinstance(model.model.layers[0].mlp.down_proj, CompensatedLinear)
