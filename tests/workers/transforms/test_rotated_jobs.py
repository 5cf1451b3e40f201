"""Rotated models through the whole job: what is stored is the same function, and only our loader opens what needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.load import load_model
from tests.inprocess import run_job
from tests.models import checkpoint, read_config

FOLDED = {"kind": "rotation", "online_down": False}
ONLINE = {"kind": "rotation", "online_output": True}


def recipe(**parts: Any) -> dict[str, Any]:
    return {"weights": {"bits": 8, "group_size": 32, "quantizer": {"kind": "rtn"}}, **parts}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rotation", [FOLDED, ONLINE], ids=["folded", "online"])
def test_logits_stay(rotation: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    original = checkpoint("llama", tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=tied)
    published = run_job(tmp_path / "model", tmp_path, recipe(transforms=[rotation]), validation={})
    document = published.document
    assert document.baseline is not None
    assert document.quantized is not None
    assert document.quantized.perplexity == pytest.approx(document.baseline.perplexity, rel=0.01)
    ids = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        found = load_model(published.uri, dtype=torch.float32)(input_ids=ids).logits
    assert (found - expected).norm() < 0.03 * expected.norm()  # 8 bits
    config = read_config(Path(published.uri.removeprefix("file://")))
    assert config["tie_word_embeddings"] is False


def test_a_folded_rotation_loads_in_stock_transformers(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    published = run_job(tmp_path / "model", tmp_path, recipe(transforms=[FOLDED]))
    ids = torch.arange(24).unsqueeze(0)
    stock = AutoModelForCausalLM.from_pretrained(published.uri.removeprefix("file://"), dtype=torch.float32)
    with torch.no_grad():
        difference = stock(input_ids=ids).logits - load_model(published.uri, dtype=torch.float32)(input_ids=ids).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
    "parts",
    [
        {"transforms": [ONLINE]},
        {"activations": {"bits": 4, "clip": 0.9}},
        {"activations": {"bits": 8, "group_size": 32}},
    ],
    ids=["online", "clip", "groups"],
)
def test_what_stock_transformers_would_ignore_it_cannot_open(parts: dict[str, Any], tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    published = run_job(tmp_path / "model", tmp_path, recipe(**parts))
    with pytest.raises(ValueError, match="counterweight"):
        AutoModelForCausalLM.from_pretrained(published.uri.removeprefix("file://"))
    assert load_model(published.uri) is not None


def test_the_residual_stream_of_the_artifact_is_rotated_and_seeds_differ(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    seen = []
    for number, transforms in enumerate(([], [FOLDED], [{**FOLDED, "seed": 1}], [{**FOLDED, "random": False}])):
        published = run_job(tmp_path / "model", tmp_path / str(number), recipe(transforms=transforms))
        seen.append(load_model(published.uri, dtype=torch.float32).model.embed_tokens.weight)
    for number, one in enumerate(seen):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in seen[:number])
        assert torch.allclose(one.norm(dim=1), seen[0].norm(dim=1), rtol=1e-3)


def test_the_ledger_accounts_for_a_tied_embedding_twice(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=True)
    published = run_job(tmp_path / "model", tmp_path, recipe(transforms=[FOLDED]))
    store, _ = open_artifact(published.uri)
    entries = json.loads(store.read("ledger.json"))["entries"]
    stored = [entry["stored_as"] for entry in entries if entry["source"] == "model.embed_tokens.weight"]
    assert stored == [["model.embed_tokens.weight"], ["lm_head.weight"]]
