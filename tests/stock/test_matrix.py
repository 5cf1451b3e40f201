"""The README's table of which engine has which logits of which recipe: every cell is tried, or was (`tests.serving.record`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from counterweight import load_model
from tests.inprocess import local, run_job
from tests.models import checkpoint, token_ids
from tests.serving.cases import SERVED
from tests.serving.record import RESULT, ROOT, digest
from tests.stock.known import known_to_transformers

TEXT, TOKENS = token_ids(2, 24), token_ids(3, 1)


def table() -> dict[str, dict[str, str]]:
    """recipe -> engine -> what the README says."""
    text = (ROOT / "README.md").read_text().partition("<!-- served -->\n")[2].partition("<!-- end -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def logits(model: Any) -> list[Tensor]:
    """Of a text that is given whole, and of tokens that come one at a time."""
    with torch.no_grad():
        return [model(ids).logits for ids in (TEXT, TOKENS)]


def stock(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def plug_in(place: Path) -> Any:
    with known_to_transformers():
        return stock(place)


def adapted(place: Path) -> Any:
    model = stock(place)
    model.hf_quantizer.compressor.decompress_model(model)
    return PeftModel.from_pretrained(model, place / "compensation").eval()


ENGINES: dict[str, Callable[[Path], Any]] = {
    "`load_model`": lambda place: load_model(place.as_uri(), dtype=torch.float32),
    "transformers": stock,
    "+ `counterweight.auto`": plug_in,
    "transformers + PEFT": adapted,
}


def said_of(load: Callable[[Path], Any], place: Path, ours: list[Tensor], codes: list[Tensor]) -> str:
    """The cell of an engine."""
    if load is adapted and not (place / "compensation").exists():
        return "no branch"
    try:
        found = logits(load(place))
    except (ValueError, KeyError, RuntimeError):
        return "refused"
    text, token = (
        torch.allclose(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
        for one, other in zip(found, ours, strict=True)
    )
    if text:
        return "yes" if token else "prefill"
    for one, other in zip(found, codes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
    return "codes"


@pytest.mark.parametrize("name", table())
def test_engines_have_what_the_readme_says(name: str, tmp_path: Path) -> None:
    case = SERVED[name]
    checkpoint(case.model, tmp_path / "model", torch.float32)
    place = local(run_job(tmp_path / "model", tmp_path / "output", case.recipe))
    ours = logits(load_model(place.as_uri(), dtype=torch.float32))
    codes = logits(load_model(place.as_uri(), dtype=torch.float32, compensated=False))
    said = table()[name]
    assert {engine: said_of(load, place, ours, codes) for engine, load in ENGINES.items()} == {
        engine: said[engine] for engine in ENGINES
    }


def test_vllm_had_what_the_readme_says() -> None:
    figures = json.loads(RESULT.read_text())["figures"]
    for name, said in table().items():
        figure = figures[name]
        assert said["vLLM"] == figure["stock"]
        assert figure["difference"] < 1e-4 + 3 * figure["noise"]
        assert said["+ plug-in"] == "yes"


def test_what_was_served_is_what_is_there() -> None:
    """Whoever changes the plug-in runs it in vLLM again: `make serve-test`."""
    assert json.loads(RESULT.read_text())["sources"] == digest(), "pipeline/serving changed: expected `make serve-test`"
