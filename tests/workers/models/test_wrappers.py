"""Text models of multimodal models: wherever a checkpoint keeps them, whatever lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from counterweight import load_model
from counterweight.pipeline.model_source import open_model
from counterweight.workers.errors import CheckpointError, UnsupportedModelError
from counterweight.workers.ledger import Ledger
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.models.families import families, family_of
from tests.inprocess import local, run_job
from tests.models import build, checkpoint, config_of, read_config, read_tensors, save, token_ids
from tests.workers.models.test_block_builder import assert_is_the_model

WRAPPERS = [name for name in families() if family_of(name).wrapper is not None]
LRC = {
    "weights": {"bits": 4},
    "activations": {"bits": 4},
    "compensation": {"kind": "lrc", "rank": {"count": 4}},
}


def respelled(directory: Path, renames: dict[str, str]) -> None:
    """Gives tensors whose names begin with a key another prefix."""
    tensors = {}
    for name, tensor in read_tensors(directory).items():
        old = next((prefix for prefix in renames if name.startswith(prefix)), "")
        tensors[renames.get(old, "") + name.removeprefix(old)] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    """null: without the field."""
    config = {name: value for name, value in {**read_config(directory), **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", ["gemma3", "mistral3"])
def test_names_are_those_of_the_version_that_wrote_the_checkpoint(case: str, tmp_path: Path) -> None:
    model = checkpoint(case, tmp_path)
    assert "language_model.model.norm.weight" in read_tensors(tmp_path)
    inner = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    outer = {name: f"model.{name}" for name in ("vision_tower.", "multi_modal_projector.")}
    respelled(tmp_path, {**inner, **outer})
    assert "model.language_model.norm.weight" in read_tensors(tmp_path)
    assert_is_the_model(model, tmp_path)
    assert open_model(tmp_path.as_uri()).beside == tuple(
        sorted(name for name in read_tensors(tmp_path) if name.startswith((*outer.values(),)))
    )


@pytest.mark.parametrize(("case", "tied"), [("gemma3", True), ("mistral3", False)])
def test_where_the_config_does_not_say_it_the_stored_head_says_whether_the_model_is_tied(
    case: str, tied: bool, tmp_path: Path
) -> None:
    """Published configs say nothing, and transformers' default is that Mistral 3 is tied, which it is not."""
    model = checkpoint(case, tmp_path)
    change_config(tmp_path, tie_word_embeddings=None)
    assert open_model(tmp_path.as_uri()).layout.tied is tied
    assert_is_the_model(model, tmp_path)


def test_a_stored_head_that_differs_from_the_embedding_contradicts_a_config_that_says_tied(tmp_path: Path) -> None:
    checkpoint("mistral3", tmp_path / "model", torch.bfloat16)
    change_config(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"true: but language_model\.lm_head\.weight differs from language_model\."
    ):
        run_job(tmp_path / "model", tmp_path / "job", LRC)


@pytest.mark.parametrize("case", WRAPPERS)
def test_all_beside_the_text_model_is_carried_over_and_accounted_for(case: str, tmp_path: Path) -> None:
    checkpoint(case, tmp_path / "model", torch.bfloat16)
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    published = run_job(tmp_path / "model", tmp_path / "job", LRC)
    source, stored = read_tensors(tmp_path / "model"), read_tensors(local(published))
    ledger = Ledger.model_validate_json((local(published) / "ledger.json").read_text())
    fates = {entry.source: entry for entry in ledger.entries}
    beside = open_model((tmp_path / "model").as_uri()).beside
    assert any(name.startswith(("vision", "model.visual")) for name in beside)
    for name in beside:
        assert torch.equal(stored[name], source[name])
        assert (fates[name].fate, fates[name].stored_as) == ("kept", (name,))
        assert fates[name].reason == "not of the text model"
    assert set(source) == set(fates)
    before, after = read_config(tmp_path / "model"), read_config(local(published))
    assert after["vision_config"] == before["vision_config"]
    assert {**before["text_config"], "tie_word_embeddings": None} == {
        **after["text_config"],
        "tie_word_embeddings": None,
    }
    assert (local(published) / "preprocessor_config.json").read_text() == "{}"
    names = open_model((tmp_path / "model").as_uri()).layout.names
    assert all(name.startswith((names.base, names.head)) for name in stored.keys() - {*beside})


@pytest.mark.parametrize("case", WRAPPERS)
def test_an_artifact_in_eight_bits_has_the_logits_of_the_original(case: str, tmp_path: Path) -> None:
    """To what eight bits cost: a part that is lost or in the wrong place costs far more."""
    model = checkpoint(case, tmp_path / "model")
    recipe = {"weights": {"bits": 8, "quantizer": {"kind": "gptq"}}, "compensation": {"kind": "none"}}
    published = run_job(tmp_path / "model", tmp_path / "job", recipe, validation={})
    ids = token_ids(2, 32)
    with torch.no_grad():
        found, expected = load_model(published.uri, dtype=torch.float32)(ids).logits, model(ids).logits
    assert float((found - expected).abs().median()) < 0.05 * float(expected.std())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text model": ({"text_config": None}, "text_config: None: expected an object"),
    "a text": ({"text_config": "x"}, "text_config: 'x': expected an object"),
    "no family": ({"text_config": {}}, "text_config.model_type: None: expected mistral"),
    "a list": ({"text_config": {"model_type": []}}, "text_config.model_type: []: expected mistral"),
    "another family": ({"text_config": {"model_type": "llama"}}, "text_config.model_type: 'llama': expected mistral"),
    "itself": ({"text_config": {"model_type": "mistral3"}}, "text_config.model_type: 'mistral3': expected mistral"),
    "tied or not": ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings: 'maybe': expected true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_does_not_say_what_the_text_model_is_is_refused(case: str) -> None:
    change, problem = REFUSED[case]
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        BlockBuilder({**config_of("mistral3"), **change})
    assert problem in str(caught.value)


def test_sizes_of_a_text_model_have_their_bounds() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers: 1000000000: expected an integer from 1 to 1024"):
        BlockBuilder(config_of("gemma3", num_hidden_layers=10**9))


def test_a_tensor_that_belongs_to_no_part_is_refused(tmp_path: Path) -> None:
    checkpoint("gemma3", tmp_path)
    stray = {"audio_tower.weight": torch.zeros(2), "model.vision_towers.weight": torch.zeros(2)}
    save_file({**read_tensors(tmp_path), **stray}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)'audio_tower.weight'.*'model.vision_towers.weight'"):
        open_model(tmp_path.as_uri())


PROJECTOR = "multi_modal_projector.linear_2.weight"


@pytest.mark.parametrize(
    ("projector", "problem"),
    [
        (None, "no weight of multi_modal_projector.linear_2: expected it, to be rotated with the text model"),
        (torch.zeros(63, 64), "F32 of shape [63, 64]: expected floats with 64 rows"),
        (torch.zeros(64, 64, dtype=torch.int8), "I8 of shape [64, 64]: expected floats with 64 rows"),
        (torch.tensor(1.0), "F32 of shape []: expected floats with 64 rows"),
    ],
    ids=str,
)
def test_a_stream_is_not_rotated_without_the_projector_that_writes_it(
    projector: torch.Tensor | None, problem: str, tmp_path: Path
) -> None:
    save(build("mistral3"), tmp_path / "model")
    tensors = read_tensors(tmp_path / "model")
    del tensors[PROJECTOR]
    if projector is not None:
        tensors[PROJECTOR] = projector
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        run_job(tmp_path / "model", tmp_path / "job", {**LRC, "transforms": [{"kind": "rotation"}]})
    assert problem in str(caught.value)
