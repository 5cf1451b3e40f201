"""Routers of the original and of what became of it: how often they agree, against transformers' own choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from counterweight import load_model
from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from counterweight.workers.errors import GateError, ManifestError
from counterweight.workers.models.routing import watched
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.workers.test_block import block_of, shards

RECIPE: dict[str, Any] = {
    "weights": {"bits": 3, "group_size": 32, "quantizer": {"kind": "rtn"}},
    "compensation": {"kind": "svd", "rank": {"count": 8}},
}
LENGTH = 32


def chosen(model: nn.Module, ids: Tensor) -> Tensor:
    """Of every block and token, the experts in order, [blocks, tokens, k]: the largest of the router's logits."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, arguments, output: found.append(output[0]))
        for name, module in model.named_modules()
        if name.endswith(".mlp.gate")
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack([logits.topk(2).indices.sort().values for logits in found])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Report]:
    root = tmp_path_factory.mktemp("routers")
    checkpoint("mixtral", root / "model", torch.bfloat16)
    place = local(run_job(root / "model", root / "out", RECIPE, validation={"windows": 8}, workers=2, threads=2))
    return root, place, Report.model_validate_json((place / "report" / "report.json").read_text())


def test_agreement_is_what_the_loaded_models_choose(made: tuple[Path, Path, Report]) -> None:
    root, place, report = made
    from counterweight.workers.calibration.source import TextSource
    from counterweight.workers.calibration.tokens import token_set

    tokenizer = (root / "model" / "tokenizer.json").read_bytes()
    source = TextSource(uri=(root / "out" / "text.txt").as_uri())
    ids = token_set(
        source, tokenizer, length=LENGTH, sequences=8, sampling="consecutive", seed=0, field="text"
    ).ids.long()
    reference = chosen(AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval(), ids)
    for variant, compensated in (("quantized", False), ("compensated", True)):
        model = load_model(place.as_uri(), dtype=torch.float32, compensated=compensated)
        same = (chosen(model, ids) == reference).all(-1).double().mean(-1)
        assert report.routers[variant] == pytest.approx(dict(enumerate(same.tolist())))
        assert report.qualities[variant].router_agreement == pytest.approx(float(same.mean()))
        assert same.min() < 1
    assert set(report.routers["baseline"].values()) == {1.0}


def test_the_page_has_it_by_block(made: tuple[Path, Path, Report]) -> None:
    page = render(made[2])
    assert "<h3>Routers</h3>" in page
    assert "block 1" in page[page.index("<h3>Routers</h3>") :]
    assert "Routers</h3>" not in render(made[2].model_copy(update={"routers": {}}))


def test_gates_can_name_it(made: tuple[Path, Path, Report], tmp_path: Path) -> None:
    gates = {"router_agreement": 0.999}
    with pytest.raises(GateError, match=r"gates\.router_agreement: 0\.\d{4}: expected at least 0\.999"):
        run_job(made[0] / "model", tmp_path, RECIPE, validation={"windows": 8, "gates": gates})


def test_a_dense_model_has_none_and_no_gate_on_it(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", torch.bfloat16)
    with pytest.raises(ManifestError, match=r"gates\.router_agreement: expected null: .* has no experts"):
        run_job(tmp_path / "model", tmp_path / "a", RECIPE, validation={"gates": {"router_agreement": 0.5}})
    place = local(run_job(tmp_path / "model", tmp_path / "b", RECIPE, validation={"windows": 2}))
    report = json.loads((place / "report" / "report.json").read_text())
    assert "router_agreement" not in report["baseline"]
    assert not any(report["routers"].values())


@pytest.mark.parametrize(("case", "index"), [("mixtral", 0), ("gpt_oss", 0), ("deepseek_v3", 1), ("llama4_text", 1)])
def test_a_blocks_choice_is_what_its_experts_see(case: str, index: int) -> None:
    block, (hidden,) = block_of(case, index=index), shards(1)
    named = block.separate_experts()
    assert named is not None
    seen = [0] * named[1].experts
    hooks = [
        named[1]
        .get_submodule(f"{expert}.up_proj")
        .register_forward_hook(lambda _, given, output, expert=expert: seen.__setitem__(expert, len(given[0])))
        for expert in range(named[1].experts)
    ]
    with watched(block) as router:
        output, routes = router.run(hidden)
    for hook in hooks:
        hook.remove()
    assert routes is not None
    assert routes.sum(0).tolist() == seen
    assert len(routes) == hidden.shape[0] * hidden.shape[1]
    assert torch.equal(output, block.run(hidden))


def test_a_dense_block_chooses_nothing() -> None:
    with watched(block_of("llama")) as router:
        assert router.run(shards(1)[0])[1] is None
