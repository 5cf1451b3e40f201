"""Models that can never work, and folders that hold more than a model: exit 2 and the tensor, layer or field by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterweight.pipeline.model_source import open_model
from counterweight.workers.errors import RequestError
from tests.inprocess import local, run_job
from tests.models import checkpoint

RECIPE = {"weights": {"bits": 4, "group_size": 32}, "compensation": {"kind": "svd", "rank": {"count": 4}}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    return tmp_path / "model"


def scaled(name: str, factor: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[name] = (torch.ones_like(tensors[name]) * factor).contiguous()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return change


NEVER: dict[str, tuple[Callable[[Path], None], str]] = {
    "large weights": (scaled("model.layers.0.mlp.up_proj.weight", 1e30), r"^block 0 .*is not finite"),
    "larger weights": (scaled("model.layers.1.self_attn.v_proj.weight", 3e38), r"^block 1 .*is not finite"),
    "a large final norm": (scaled("model.norm.weight", 3e38), "expected finite logits, from the final norm"),
    "a large head": (
        scaled("lm_head.weight", 3e38),
        "expected finite logits, from the final norm and lm_head",
    ),
    "a negative epsilon": (configured(rms_norm_eps=-1), "config.json: rms_norm_eps: -1: expected"),
    "no theta": (configured(rope_theta=0), "config.json: rope_theta: 0: expected a positive number"),
    "a negative theta": (configured(rope_theta=-1e4), "config.json: rope_theta: -10000.0: expected a positive number"),
    "labels": (configured(num_labels=10**7), "config.json: num_labels: 10000000: expected"),
}


@pytest.mark.parametrize("case", NEVER)
@pytest.mark.parametrize("recipe", ["plain", "with a store"])
def test_a_model_that_can_never_work_is_a_wrong_request(model: Path, tmp_path: Path, case: str, recipe: str) -> None:
    spoil, said = NEVER[case]
    spoil(model)
    asked = RECIPE if recipe == "plain" else {**RECIPE, "residual": {"bits": 4}}
    with pytest.raises(RequestError, match=said) as caught:
        run_job(model, tmp_path / "out", asked, validation={})
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "out").rglob("artifact.json"))


def test_a_linked_secret_is_not_published(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("topsecret")
    (model / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(RequestError, match=r"special_tokens_map\.json: a link out of"):
        run_job(model, tmp_path / "out", RECIPE)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"topsecret" in path.read_bytes()]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt"])
def test_a_pipe_in_the_models_folder_is_refused_at_once(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(RequestError, match=f"{name}: a named pipe: expected a regular file"):
        run_job(model, tmp_path / "out", RECIPE)


def test_a_side_file_of_any_size_is_carried_over_in_pieces(model: Path, tmp_path: Path) -> None:
    import tracemalloc

    with (model / "merges.txt").open("wb") as file:
        file.truncate(300 << 20)  # sparse
    tracemalloc.start()
    try:
        published = run_job(model, tmp_path / "out", RECIPE)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert (local(published) / "merges.txt").stat().st_size == 300 << 20


def test_links_inside_the_folder_go_on_working(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    assert open_model(model.as_uri()).tensors
