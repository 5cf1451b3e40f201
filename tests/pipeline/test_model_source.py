from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from counterweight.pipeline.model_files import HUB_FILES, hub_answers
from counterweight.pipeline.model_source import check_stored_head, open_model
from counterweight.workers.calibration.windows import TokenizerFiles
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.errors import CheckpointError, RequestError, StorageError
from tests.models import checkpoint, read_tensors


def model(root: Path, case: str = "llama", **changes: Any) -> Path:
    checkpoint(case, root / "model", torch.bfloat16, **changes)
    return root / "model"


def rewrite(directory: Path, **tensors: torch.Tensor) -> None:
    """Adds tensors to a checkpoint; `__` in a name stands for a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**read_tensors(directory), **more}, directory / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_belongs_to_one_block_or_to_none(tmp_path: Path) -> None:
    source = open_model(model(tmp_path).as_uri())
    parts = [set(source.block_tensors(index)) for index in range(2)]
    assert len(parts[0]) == len(parts[1]) == 9
    assert all(name.startswith("model.layers.1.") for name in parts[1])
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert parts[0] | parts[1] | outside == set(source.tensors)
    assert source.dropped == {}
    assert source.parameters == sum(prod(tensor.shape) for tensor in read_tensors(tmp_path / "model").values())


def test_experts_of_a_fused_checkpoint_share_their_tensors(tmp_path: Path) -> None:
    from tests.models import build, save_fused

    save_fused(build("mixtral"), tmp_path / "model")
    source = open_model((tmp_path / "model").as_uri())
    names = source.block_tensors(0)
    assert len(names) == len(set(names))
    assert "model.layers.0.mlp.experts.gate_up_proj" in names


def test_stored_rotary_frequencies_are_dropped_and_nothing_else(tmp_path: Path) -> None:
    directory = model(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = open_model(directory.as_uri())
    rewrite(directory, **{name: torch.ones(8)})
    after = open_model(directory.as_uri())
    assert after.dropped == {name: "follows from the config"}
    assert after.tensors == before.tensors
    assert after.parameters == before.parameters
    rewrite(directory, model__layers__0__self_attn__rotary_emb__inv_freq2=torch.ones(8))
    with pytest.raises(CheckpointError, match="inv_freq2': shape \\[8\\], expected no such tensor"):
        open_model(directory.as_uri())


def test_a_tied_head_may_be_stored_when_it_is_the_embedding(tmp_path: Path) -> None:
    directory = model(tmp_path, "llama-tied-biased")
    rewrite(directory, lm_head__weight=read_tensors(directory)["model.embed_tokens.weight"].clone())
    source = open_model(directory.as_uri())
    same = Checkpoint.open(source.store).inspect(["lm_head.weight", "model.embed_tokens.weight"])
    check_stored_head(source, {name: found.sha256 for name, found in same.items()})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings: true: but lm_head.weight differs"):
        check_stored_head(source, {"lm_head.weight": "a", "model.embed_tokens.weight": "b"})


def test_an_untied_head_is_its_own(tmp_path: Path) -> None:
    source = open_model(model(tmp_path).as_uri())
    check_stored_head(source, {"lm_head.weight": "a", "model.embed_tokens.weight": "b"})


def test_the_tokenizer_is_the_files_bytes_or_nothing(tmp_path: Path) -> None:
    directory = model(tmp_path)
    source = open_model(directory.as_uri())
    assert source.tokenizer() == TokenizerFiles((directory / "tokenizer.json").read_bytes())
    (directory / "tokenizer.json").unlink()
    assert source.tokenizer() is None


def test_a_hub_name_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model(tmp_path)
    asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert open_model("hf:owner/name").uri == directory.as_uri()
    assert open_model("hf://owner/name@v1.0").parameters > 0
    assert asked == [("owner/name", None, HUB_FILES), ("owner/name", "v1.0", HUB_FILES)]
    assert not any("bin" in pattern or ".py" in pattern or pattern == "*" for pattern in HUB_FILES)


def test_a_hub_that_fails_says_for_which_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def failing(error: Exception) -> None:
        def snapshot(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)

    failing(LocalEntryNotFoundError("offline"))
    with pytest.raises(StorageError, match=r"spec.model.uri: hf:owner/name: offline"):
        open_model("hf:owner/name")
    failing(HFValidationError("bad name"))
    with pytest.raises(RequestError, match=r"spec.model.uri: hf:a/b/c: bad name"):
        open_model("hf:a/b/c")


def test_a_model_whose_config_lies_about_a_shape_is_refused(tmp_path: Path) -> None:
    directory = model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 97}))
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight': shape \[64, 96\], expected \[64, 97\]"):
        open_model(directory.as_uri())


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout that huggingface_hub keeps: named links below snapshots/, content below blobs/. No network."""
    from huggingface_hub import constants

    checkpoint("llama", tmp_path / "model")
    root, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (root / folder).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted((tmp_path / "model").iterdir())):
        blob = path.rename(root / "blobs" / str(number))
        (root / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root.parent))
    source = open_model("hf:owner/name")
    assert source.uri == (root / "snapshots" / commit).as_uri()
    name = source.tensors[0]
    assert Checkpoint.open(source.store).read(name).numel() > 0
    with pytest.raises(StorageError, match=r"spec.model.uri: hf:owner/other"):
        open_model("hf:owner/other")


def test_no_way_to_the_hub_is_no_defect() -> None:
    hub = HfApi(endpoint="http://127.0.0.1:1", token=False)
    with pytest.raises(StorageError, match="repository: hf:owner/name: "), hub_answers("hf:owner/name", "repository"):
        hub.create_repo("owner/name")
