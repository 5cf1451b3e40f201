"""Linears solved after several passes over the shards: the bits of one pass, with the statistics of a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.workers.calibrated_block import calibrated, gathered
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.errors import RequestError
from counterweight.workers.methods.quantizers import GPTQ as GPTQQuantizer
from counterweight.workers.models.family import is_expert
from counterweight.workers.models.lent import LentLinear
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.gains import Gains
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.worker import Worker
from tests.models import build, save_fused
from tests.workers.noise import GPTQ, LRC, SMOOTHED, TUNED, Propagate, content, in_passes, run, site_of, spec_of
from tests.workers.specs import RECIPE


@pytest.mark.parametrize(
    ("case", "recipe", "propagate"),
    [
        ("mixtral", GPTQ, "original"),
        ("mixtral", LRC, "original"),
        ("mixtral", LRC, "compressed"),
        ("mixtral", SMOOTHED, "original"),
        ("llama4_text", RECIPE, "original"),
        ("llama", SMOOTHED, "original"),
        ("llama", TUNED, "compressed"),
    ],
)
def test_any_division_has_the_bits_of_none(
    case: str, recipe: Mapping[str, Any], propagate: Propagate, tmp_path: Path
) -> None:
    site = site_of(case, tmp_path)
    spec = spec_of(site, recipe, propagate)
    if propagate == "compressed" and recipe is LRC:
        spec = spec.model_copy(update={"original_inputs": tuple(reversed(spec.inputs))})
    whole = content(run(Compress(block=spec)))
    assert whole["modules"]
    for together, threads in ((1, 1), (3, 2)):
        divided = in_passes(spec, site, together)
        assert len(divided.passes) > 1
        assert divided.key() == spec.key(), "the division is no part of the result"
        assert content(run(Compress(block=divided), threads)) == whole


@pytest.mark.parametrize(
    ("recipe", "experts"),
    [
        (GPTQ, ExpertCalibration(floor=64, sample=0.5)),
        (LRC, ExpertCalibration(floor=64)),
        (SMOOTHED, ExpertCalibration(floor=64)),
        (GPTQ, ExpertCalibration(every_token=True)),
    ],
)
def test_a_division_changes_nothing_of_what_starved_experts_are_solved_on(
    recipe: Mapping[str, Any], experts: ExpertCalibration, tmp_path: Path
) -> None:
    """Though tokens of the layer are kept in the first pass, whose linears are the attention's alone."""
    site = site_of("mixtral", tmp_path)
    spec = spec_of(site, recipe, experts=experts)
    whole = content(run(Compress(block=spec)))
    starved = [module["name"] for module in whole["modules"] if module["fallbacks"]]
    assert bool(starved) != experts.every_token
    assert whole != content(run(Compress(block=spec_of(site, recipe))))
    for together, threads in ((1, 1), (3, 2)):
        divided = in_passes(spec, site, together)
        assert content(run(Compress(block=divided), threads)) == whole


def test_a_fused_checkpoint_is_divided_too(tmp_path: Path) -> None:
    site = site_of("mixtral", tmp_path)
    save_fused(build("mixtral").bfloat16(), tmp_path / "model")
    spec = spec_of(site, GPTQ)
    assert content(run(Compress(block=in_passes(spec, site, 2)))) == content(run(Compress(block=spec)))


@pytest.mark.parametrize("recipe", [GPTQ, LRC])
def test_batches_of_any_size_have_the_bits_of_one_by_one(
    recipe: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    quantize = GPTQQuantizer.quantize_batch

    def counted(self: GPTQQuantizer, weights: Tensor, *rest: Any, **more: Any) -> Any:
        calls[-1] += 1
        return quantize(self, weights, *rest, **more)

    monkeypatch.setattr(GPTQQuantizer, "quantize_batch", counted)
    site = site_of("mixtral", tmp_path)
    spec = spec_of(site, recipe)
    found = []
    for room in (0, 1 << 17, 1 << 40):
        calls.append(0)
        sized = spec.model_copy(update={"batch_bytes": room})
        assert sized.key() == spec.key(), "the batches are no part of the result"
        found.append(content(run(Compress(block=sized))))
    assert found[0]["modules"]
    assert found[0] == found[1] == found[2]
    assert calls[0] >= calls[1] >= calls[2]
    assert calls[0] > calls[2]


def test_gains_are_those_of_one_pass(tmp_path: Path) -> None:
    site = site_of("mixtral", tmp_path)
    budget = {**RECIPE, "compensation": {"kind": "svd", "rank": {"budget_bits": 1.0}}}
    spec = spec_of(site, budget)
    assert run(Gains(block=in_passes(spec, site, 3))).gains == run(Gains(block=spec)).gains


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("cpu")
    yield worker
    worker.close()


def test_a_pass_gathers_its_own_groups_and_runs_its_own_experts(tmp_path: Path, worker: Worker) -> None:
    site = site_of("mixtral", tmp_path)
    spec = in_passes(spec_of(site, GPTQ), site, 3)
    held = calibrated(worker.context, spec, site.workspace)
    groups = held.loaded.block.groups
    ran: list[set[str]] = []
    for name in (name for group in groups for name in group if is_expert(name)):
        held.loaded.block.linear(name).register_forward_pre_hook(lambda *_, name=name: ran[-1].add(name))
    seen: list[set[str]] = []
    ran.append(set())
    for statistics in gathered(worker.context, spec, held, site.workspace):
        seen.append({name for group in statistics for name in group})
        ran.append(set())
    assert seen == [set(names) for names in spec.passes]
    assert len(seen) == 2
    assert ran[1] == seen[1], "the experts of the first pass are not run again"


def test_experts_of_a_divided_block_run_as_they_were_read_until_they_are_solved(tmp_path: Path, worker: Worker) -> None:
    site = site_of("mixtral", tmp_path)
    spec = spec_of(site, GPTQ)
    whole = calibrated(worker.context, spec, site.workspace).loaded
    divided = calibrated(worker.context, in_passes(spec, site, 3), site.workspace).loaded
    experts = [name for group in divided.block.groups for name in group if is_expert(name)]
    assert all(isinstance(divided.block.linear(name), LentLinear) for name in experts)
    assert all(divided.block.linear(name).weight.dtype is torch.bfloat16 for name in experts)
    weights = sum(divided.parameters[f"{name}.weight"].nbytes for name in experts)
    assert divided.bytes <= whole.bytes - 2 * weights, "no float32 copy of them"
    before = divided.bytes
    divided.let_go(experts)
    assert divided.bytes == before - weights
    assert "self_attn.q_proj.weight" in divided.parameters


def test_an_input_that_is_not_finite_is_told_in_whichever_pass_it_is_seen(tmp_path: Path) -> None:
    site = site_of("llama", tmp_path)
    spec = spec_of(site, RECIPE)
    hidden = torch.full((1, 8, site.builder.hidden_size), torch.inf)
    bad = put_tensors(site.workspace, {"hidden": hidden}, durable=False)
    spec = spec.model_copy(update={"inputs": (*spec.inputs, bad), "passes": (("mlp.down_proj",), ("mlp.up_proj",))})
    with pytest.raises(RequestError, match=r"the input of mlp\.down_proj is not finite"):
        run(Compress(block=spec))
